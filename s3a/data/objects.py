"""Splits whose targets are objects, and how they speak of them in the format of COCO."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from s3a.data.images import MapImages
from s3a.data.targets import Objects, Target


class ObjectImages(MapImages):
    """Images whose targets are objects, by row number.

    Attributes:
        image_ids: what COCO's format calls each row.
        category_ids: what it calls each class, in label order.
        has_masks: whether each object has a mask; else it has a box alone.
    """

    image_ids: Sequence[int]
    category_ids: Sequence[int]
    has_masks: bool = True
    blank: Target | None = Objects()

    @abstractmethod
    def build_ground_truth(self) -> dict[str, Any]:
        """The split's images, categories and annotations as a dict of COCO's format, which AP is computed from."""
