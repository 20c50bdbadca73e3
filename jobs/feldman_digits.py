"""What does a small net memorize of sklearn's handwritten digits?

400 models, each trained on a random 70% of 1,200 digits, give every digit's memorization
(Feldman & Zhang 2020) with its interval.

    python jobs/feldman_digits.py
"""

from raymem import JobOptions, Recipe, Study, run_job

RECIPE = Recipe(model="mlp-512-256", epochs=30, batch_size=64, learning_rate=0.1)


def study(options: JobOptions) -> Study:
    return options.study(RECIPE)


if __name__ == "__main__":
    run_job(study, data="digits", store="runs/feldman_digits", trials=400, curvature=True)
