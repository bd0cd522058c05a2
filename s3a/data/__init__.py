"""Images: where they come from, and the loaders that feed training and evaluation.

A source becomes two `Images`, one per split. Where these can be read in any order, what a step of training sees is a
function of the seed, the epoch and the step alone: not of the processes, the workers or where a run was interrupted.
Streams are read in the order they are stored in, by readers that divide the shards: there a step depends on how many
processes and workers there are.
"""

from s3a.data.batches import Batch
from s3a.data.images import DatasetImages, ImageData, Images
from s3a.data.loaders import EvalLoader, TrainLoader
from s3a.data.sources import DataOptions, Kind, Source, load_data

__all__ = [
    "Batch",
    "DataOptions",
    "DatasetImages",
    "EvalLoader",
    "ImageData",
    "Images",
    "Kind",
    "Source",
    "TrainLoader",
    "load_data",
]
