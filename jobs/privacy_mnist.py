"""What does differential privacy leave of memorization and curvature? MNIST-like sets, small nets.

The same random halves are trained on without privacy and by DP-SGD, and curvature is measured in
every model.

    python jobs/privacy_mnist.py --data mnist --download
    python jobs/privacy_mnist.py --data fashion-20000.npz --trials 100
"""

from raymem import JobOptions, Recipe, Study, run_job

# Adam's steps have one size, however large the noise; the rate falls to zero, for models that fit.
RECIPE = Recipe(
    model="mlp-512-256",
    epochs=30,
    batch_size=256,
    optimizer="adam",
    learning_rate=0.001,
    schedule="linear",
)


def study(options: JobOptions) -> Study:
    return options.study(RECIPE)


if __name__ == "__main__":
    run_job(
        study,
        data="mnist",
        store="runs/privacy_mnist",
        trials=200,
        subset_ratio=0.5,
        curvature=True,
        epsilons="8,inf",
    )
