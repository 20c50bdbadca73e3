"""What does differential privacy do to memorization and curvature? The paper's experiments.

Ravikumar et al. 2024, sections 6.4 and 6.5, as studies of CIFAR-10, CIFAR-100, Fashion-MNIST or
your own .npz: the same random subsets are trained on by DP-SGD at each epsilon.

Link 2, mean curvature and loss against epsilon, several seeds each:

    python jobs/privacy_cifar.py --data cifar10 --download --epsilons paper-curvature \\
        --subset-ratio 1 --trials 10 --store runs/link2

Link 3, memorization against epsilon: the 500 examples that an earlier study found most memorized
are in or out at random, all others are always in:

    python jobs/feldman_cifar.py --data cifar100 --download --store runs/feldman_cifar100
    python jobs/privacy_cifar.py --data cifar100 --pool-from runs/feldman_cifar100 \\
        --epsilons paper-memorization --trials 40 --no-curvature --store runs/link3

From epsilon 5 on 1 - e^-eps is 1: the paper's grids cannot tell its law from others. The default
here is 0.5 to 64 and inf. The recipe `paper` is that of section 6.4 (ResNet-18 with GroupNorm, 20
epochs, batches of 128, learning rate 0.001 divided by ten at epochs 12 and 16, clipped to 1); the
optimizer is not named there, Adam here. `laptop` is a small net that two cores can train.

Curvature is by exact Hessian products, which on GroupNorm take some ten times a training epoch;
--curvature-mode gauss-newton is cheaper, and another quantity, recorded as such.
"""

import math

from raymem import CurvatureRule, JobSettings, PoolSettings, Recipe, run_job

PAPER = Recipe(
    model="cifar-resnet18-gn",
    epochs=20,
    batch_size=128,
    optimizer="adam",
    learning_rate=0.001,
    schedule="steps",
    milestones=(0.6, 0.8),
    std=(0.25,),
)
RECIPES = {
    # Larger batches and steps: little is learned under noise in few small ones.
    "laptop": Recipe(
        model="tiny-resnet-gn",
        epochs=20,
        batch_size=256,
        optimizer="adam",
        learning_rate=0.002,
        std=(0.25,),
    ),
    # Not run on a GPU yet.
    "paper": PAPER,
}


if __name__ == "__main__":
    run_job(
        JobSettings(
            data="cifar10",
            store="runs/privacy_cifar",
            trials=40,
            subset_ratio=0.5,
            curvature=CurvatureRule(),
            curvature_trials=20,
            epsilons=(0.5, 1, 2, 4, 8, 16, 32, 64, math.inf),
            pool=PoolSettings(pool_size=500),
        ),
        RECIPES,
    )
