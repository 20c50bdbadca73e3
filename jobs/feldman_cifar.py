"""What does a small ResNet memorize of CIFAR-10, CIFAR-100, Fashion-MNIST, or your own .npz?

Memorization and influence (Feldman & Zhang 2020) from models trained on random 70% of the set.

    python jobs/feldman_cifar.py --data cifar10 --download --recipe gpu
    python jobs/feldman_cifar.py --data ten-thousand.npz --trials 120

Cost of the laptop recipe: about 40 s of one of two busy cores for 10,000 images of 32x32, 125 kB
of disk; scoring 120 models took 5 s.

10,000 images of CIFAR-10 and 2,000 test images, 120 models on two cores (46 minutes, the machine
shared), 2026-11-24: accuracy 99.5% in, 54.9% out, 54.8% test, so most of what fits is memorized:
mean memorization 0.446, 6,251 examples above 0.25, 6,459 on the list at 5% false discoveries.
Reliability 0.965 (soft 0.976); 0.98 would take 212 models. Of 12.9 million pairs 4 are strong:
three (up to 0.71) are the same photograph, cropped anew, in training and test, the fourth (0.41, a
frog and a bird) looks like the one expected by chance. 120 models are few for influence.
"""

from raymem import JobOptions, Recipe, Study, run_job

RECIPES = {
    # Minutes of a laptop's core per 10,000 images; no augmentation, so that few epochs memorize.
    "laptop": Recipe(
        model="tiny-resnet",
        epochs=12,
        batch_size=64,
        learning_rate=0.2,
        weight_decay=5e-4,
        schedule="linear",
        warmup=0.2,
        channels_last=True,
        std=(0.25,),
    ),
    # Not run on a GPU yet.
    "gpu": Recipe(
        model="cifar-resnet18",
        epochs=40,
        batch_size=256,
        learning_rate=0.2,
        nesterov=True,
        weight_decay=5e-4,
        warmup=0.1,
        crop_padding=4,
        flip=True,
        precision="bfloat16",
        channels_last=True,
        std=(0.25,),
    ),
}


def study(options: JobOptions) -> Study:
    return options.study()


if __name__ == "__main__":
    run_job(study, data="cifar10", store="runs/feldman_cifar", trials=1000, recipes=RECIPES)
