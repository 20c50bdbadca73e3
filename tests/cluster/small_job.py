"""A job small enough for tests and long enough to be killed: python small_job.py --store PATH."""

from raymem import Examples, JobSettings, Recipe, load_examples, run_job

digits = load_examples("digits")
FEW = Examples(
    x_train=digits.x_train[:400],
    y_train=digits.y_train[:400],
    x_test=digits.x_test[:100],
    y_test=digits.y_test[:100],
    name="400 digits",
)

if __name__ == "__main__":
    run_job(
        JobSettings(data=FEW, store="runs/small_job", trials=40),
        Recipe(model="mlp-128", epochs=40, batch_size=16),
    )
