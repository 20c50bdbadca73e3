"""Input loss curvature of every image of a sharded set, under one or many given models.

Streams WebDataset tars, Parquet files of encoded images (as on Hugging Face) or folders of images,
local or at s3://, gs://, through CPU decoders and one model per GPU (or per core, without GPUs).

    python jobs/curvature_imagenet.py --data imagenet/val --store runs/curvature --model resnet50
    python jobs/curvature_imagenet.py --data 's3://b/train-*.tar' --store s3://b/c --model resnet18
    python jobs/curvature_imagenet.py --data x.parquet --store runs/c --model resnet18 \\
        --weights mine.safetensors --n-classes 10
    python jobs/curvature_imagenet.py --data shards --store runs/cifar --models-of runs/cifar

Of each image: the trace of the Hessian of the loss in the pixels, its error (1,000 classes: the 8
likeliest exactly, the rest by 2 probes), tr H^2, gradient norm, loss, and with --paper the finite
difference of Ravikumar et al. 2024. One object per shard, STORE/curvature/MODEL/SHARD.parquet;
what is there is not scored again. Cost of ResNet-50 at 224 pixels: about 12 forward passes an
image; on one CPU core 1.4 s. Not run on a GPU yet.
"""

from raymem.cli import run_curvature_job

if __name__ == "__main__":
    run_curvature_job()
