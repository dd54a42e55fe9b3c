"""Read data sets and draw training samples: manifests, other layouts, shards, augmentation, synthetic scenes."""

from d2svse.data.collate import Batch, Collator, Sample
from d2svse.data.dataset import ImageTextDataset
from d2svse.data.manifest import ManifestError, Record, join_dense, read_manifest, write_manifest
from d2svse.data.readers import read_records
from d2svse.data.samples import EpochBatches, TrainingSamples
from d2svse.data.scenes import make_scene, write_scenes

__all__ = [
    "Batch",
    "Collator",
    "EpochBatches",
    "ImageTextDataset",
    "ManifestError",
    "Record",
    "Sample",
    "TrainingSamples",
    "join_dense",
    "make_scene",
    "read_manifest",
    "read_records",
    "write_manifest",
    "write_scenes",
]
