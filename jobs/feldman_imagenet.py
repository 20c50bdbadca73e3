"""What does a ResNet-50 memorize of ImageNet? Feldman & Zhang's study, with curvature beside it.

Memorization and influence from models trained on random 70% of the set, and the input loss
curvature of every training image under 100 of them (Ravikumar et al. 2024, section 6.3).

    python jobs/feldman_imagenet.py --smoke
    raymem ingest imagenet imagenet-128 --size 128
    python jobs/feldman_imagenet.py plan --data imagenet-128
    ray job submit --working-dir . -- python jobs/feldman_imagenet.py \\
        --data s3://bucket/imagenet-128 --store s3://bucket/feldman --gpus-per-trial 1

--smoke runs the same chain on a few small images that it makes itself. --data may be the set as
people have it (folders, WebDataset tars, Parquet) with --cache for where its cache is to be.
--epsilons 2,8,inf trains each subset privately too, with GroupNorm and in float32.
--workers-per-trial 8 trains each model on 8 GPUs; with BatchNorm each GPU then takes the statistics
of its share of the batch, which is another recipe in small print.

The recipes are usual ones for ResNet-50, with batches of 1,024: 16 epochs (`quick`) or 90 (`long`)
at 128 pixels and crops of 112. None of these has run on a GPU, and no model of ImageNet was
trained; docs/scaling.md says what it would cost, docs/cluster.md how to start.
"""

import dataclasses

from raymem import CurvatureRule, JobSettings, Recipe, run_job
from raymem.cli import CacheSettings, Smoke

QUICK = Recipe(
    model="resnet50",
    epochs=16,
    batch_size=1024,
    learning_rate=2.0,
    nesterov=True,
    weight_decay=5e-5,
    schedule="linear",
    warmup=0.125,
    crop_scale=(0.25, 1.0),
    crop_size=112,
    flip=True,
    precision="bfloat16",
    channels_last=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
RECIPES = {
    "quick": QUICK,
    "long": dataclasses.replace(
        QUICK, epochs=90, learning_rate=0.4, weight_decay=1e-4, schedule="cosine", warmup=0.05
    ),
}
RECIPES["quick-compiled"] = dataclasses.replace(QUICK, compile=True)
# The same in small: four classes of 32 pixels, a net of the same kind, minutes of a laptop.
SMOKE = Smoke(
    recipe=dataclasses.replace(
        QUICK,
        model="tiny-resnet",
        epochs=12,
        batch_size=16,
        learning_rate=0.1,
        crop_size=28,
        precision="float32",
    )
)


if __name__ == "__main__":
    run_job(
        JobSettings(
            data="imagenet-128",
            store="runs/feldman_imagenet",
            trials=2000,
            curvature=CurvatureRule(),
            curvature_at="stage",
            curvature_trials=100,
            cache=CacheSettings(size=128),
        ),
        RECIPES,
        smoke=SMOKE,
    )
