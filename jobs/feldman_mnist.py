"""Feldman & Zhang's MNIST study: 2,000 small nets on random 70% of the training set.

784-512-256-10, 10 epochs of batches of 128, SGD with momentum 0.9 at a constant 0.1, pixels as
they are in [0, 1].

    python jobs/feldman_mnist.py --data mnist --download
    python jobs/feldman_mnist.py --data fashion-mnist --data-root data --trials 240
"""

from raymem import JobOptions, Recipe, Study, run_job

RECIPE = Recipe(
    model="mlp-512-256",
    epochs=10,
    batch_size=128,
    learning_rate=0.1,
    momentum=0.9,
    schedule="constant",
    mean=(0.0,),
    std=(1.0,),
)


def study(options: JobOptions) -> Study:
    return Study(
        examples=options.load_examples(),
        recipe=RECIPE,
        store=options.store,
        trials=options.trials,
        subset_ratio=options.subset_ratio,
        kind=options.kind,
        seed=options.seed,
    )


if __name__ == "__main__":
    run_job(study, data="mnist", store="runs/feldman_mnist", trials=2000)
