"""A job small enough for tests and long enough to be killed: python small_job.py --store PATH."""

from raymem import Examples, JobOptions, Recipe, Study, run_job


def study(options: JobOptions) -> Study:
    digits = options.load_examples()
    few = Examples(
        x_train=digits.x_train[:400],
        y_train=digits.y_train[:400],
        x_test=digits.x_test[:100],
        y_test=digits.y_test[:100],
        name="400 digits",
    )
    return Study(
        examples=few,
        recipe=Recipe(model="mlp-128", epochs=40, batch_size=16),
        store=options.store,
        trials=options.trials,
        seed=options.seed,
    )


if __name__ == "__main__":
    run_job(study, data="digits", store="runs/small_job", trials=40)
