"""Images: where they come from, and the loaders that feed training and evaluation.

A source becomes two `Images`, one per split, which are read by row number. What a step of training sees is a function
of the seed, the epoch and the step alone: not of the processes, the workers or where a run was interrupted.
"""

from s3a.data.batches import Batch
from s3a.data.images import DatasetImages, ImageData, Images
from s3a.data.loaders import EvalLoader, TrainLoader
from s3a.data.sources import DataOptions, Source, load_data

__all__ = [
    "Batch",
    "DataOptions",
    "DatasetImages",
    "EvalLoader",
    "ImageData",
    "Images",
    "Source",
    "TrainLoader",
    "load_data",
]
