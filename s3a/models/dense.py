"""The base of models that predict for every place of an image: a backbone's maps, and what is loaded into them.

Shapes: images [batch, in_chans, height, width], maps [batch, dim, height / stride, width / stride] with strides 4, 8,
16 and 32, of which a backbone may have the first ones alone.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Format, LayerNorm2d
from timm.models import FeatureInfo, build_model_with_cfg, get_pretrained_cfg
from torch import Tensor, nn

from s3a.models.backbone import BUILDER_ARGUMENTS, INPUT_SIZES
from s3a.support.errors import UnknownArgumentError, make_unknown_error
from s3a.weights.card import Purpose
from s3a.weights.folder import FACTORY_ARGUMENTS, forget_other_labels, shorten_list
from s3a.weights.pretrained import PretrainedMixin

MIN_IMAGE_SIZE = 32
# What makes timm's models of a fixed image size take any; a model knows one of them at most.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
# timm puts what it takes maps from into a module of these names, or renames the children of a Sequential.
WRAPPERS = ("model.", "body.")
PREPROCESSING = ("mean", "std", "interpolation")

DenseT = TypeVar("DenseT", bound="DenseModel")


@dataclass(frozen=True)
class TakenWeights:
    """What `DenseModel.take_weights` did.

    Attributes:
        taken: keys of the dense model that hold the weights of the classification model now.
        left: keys of the classification model that the dense model has no place for, such as its classifier.
        new: keys of the dense model that keep what they had: its norms and heads.
    """

    taken: tuple[str, ...]
    left: tuple[str, ...]
    new: tuple[str, ...]


class DenseModel(PretrainedMixin):
    """A backbone that returns its maps, with a LayerNorm behind each map that the head reads.

    The authors add these norms too. A subclass builds the head in its constructor, and calls `reset_classifier` last.

    Args:
        backbone: the name of a hierarchical model in timm's registry.
        backbone_args: more arguments for it, such as {"drop_path_rate": 0.1}.
        in_chans: channels of the images.
        first_stride: maps of smaller strides are left out.

    Raises:
        ValueError: for a backbone that timm does not know, or whose maps have other strides.

    Attributes:
        quantized_part: name of the module whose linear layers quantization converts.
        strides, dims: those of the maps that the head reads.
        classifiers: names of the layers that depend on the number of classes; the first one makes the logits.
    """

    purpose: ClassVar[Purpose]
    quantized_part: ClassVar[str] = "backbone"
    classifiers: tuple[str, ...]
    num_classes: int
    pretrained_cfg: dict[str, Any]

    def __init__(
        self, *, backbone: str, backbone_args: Mapping[str, Any] | None, in_chans: int, first_stride: int = 4
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.backbone_name, self.backbone_args = backbone, dict(backbone_args or {})
        self.backbone = create_features(backbone, {**self.backbone_args, "in_chans": in_chans})
        info = cast("FeatureInfo", self.backbone.feature_info)
        found = dict(enumerate(zip(info.reduction(), info.channels(), strict=True)))
        maps = {index: each for index, each in found.items() if each[0] >= first_stride}
        self.map_indices = tuple(maps)
        self.strides = tuple(stride for stride, _ in maps.values())
        self.dims = tuple(dim for _, dim in maps.values())
        if len(maps) < 2 or self.strides != tuple(first_stride * 2**index for index in range(len(maps))):
            raise ValueError(
                f"the maps of {backbone} have strides {info.reduction()}: they must be {first_stride}, "
                f"{2 * first_stride} and so on; choose a hierarchical backbone, such as ssvit_tiny"
            )
        # models of patches that do not pad images themselves
        self.image_multiple = self.strides[0] if is_fixed_size(backbone) else 1
        self.norms = nn.ModuleList(LayerNorm2d(dim) for dim in self.dims)
        self._traits = {"first_conv": self.find_first_conv()}  # as timm's factory and folders have it

    @property
    def citation(self) -> str | None:
        """The paper of the backbone, in BibTeX; None where that is not of this library."""
        return getattr(getattr(self.backbone, "model", self.backbone), "citation", None)

    def find_first_conv(self) -> str | None:
        """The name of the convolution that reads images; None where timm does not say which that is."""
        cfg = cast("dict[str, Any]", self.backbone.pretrained_cfg)
        key = f"{cfg['first_conv']}.weight"
        name = rename_keys([key], self.backbone.state_dict()).get(key)
        return name and f"backbone.{name.removesuffix('.weight')}"

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images with other channels, or of less than 32 pixels a side."""
        if images.ndim != 4 or images.shape[1] != self.in_chans or min(images.shape[2:]) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: they must be [batch, {self.in_chans}, height, width] with "
                f"sides of {MIN_IMAGE_SIZE} pixels at least; resize or pad them, or build the model with in_chans="
            )

    def extract_maps(self, images: Tensor) -> list[Tensor]:
        """The normalised maps, that of the smallest stride first; errors are those of `check_images`.

        Images get zeros right and below, up to whole patches of backbones that take no others.
        """
        self.check_images(images)
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.image_multiple, 0, -height % self.image_multiple))
        maps = self.backbone(images)
        if getattr(self.backbone, "output_fmt", None) == Format.NHWC:
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        return [norm(maps[index]) for norm, index in zip(self.norms, self.map_indices, strict=True)]

    def count_forward(self, images: Tensor) -> None:
        """Runs every layer as for a prediction, also on the meta device, where counters of operations look on."""
        raise NotImplementedError

    def build_outputs(self, num_classes: int) -> dict[str, nn.Module]:
        """Fresh layers for so many classes, by the names of those that they replace; the first makes the logits."""
        raise NotImplementedError

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that makes the logits of classes; the first one of several."""
        return self.get_submodule(self.classifiers[0])

    def reset_classifier(self, num_classes: int, global_pool: None = None) -> None:
        """Replaces all layers that depend on the number of classes by ones with fresh weights."""
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: a dense model needs one class at least")
        weight, outputs = next(self.norms.parameters()), self.build_outputs(num_classes)
        self.classifiers = tuple(outputs)
        for name, layer in outputs.items():
            self.set_submodule(name, layer.to(device=weight.device, dtype=weight.dtype))
        self.num_classes = num_classes

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the activations of the backbone's blocks again for the backward."""
        model: Any = getattr(self.backbone, "model", self.backbone)
        model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: those that the backbone's family names."""
        model: Any = build_classifier(self)
        names: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        renamed = rename_keys(names, self.backbone.state_dict())
        return {f"backbone.{name}" for name in renamed.values()}

    @torch.no_grad()
    def take_weights(self, weights: nn.Module | Mapping[str, Tensor]) -> TakenWeights:
        """Copies the weights of a classification model of the backbone's architecture into the backbone.

        Args:
            weights: the classification model, or its state dict.

        Raises:
            ValueError: for weights of another architecture.
        """
        given = weights.state_dict() if isinstance(weights, nn.Module) else weights
        known, own = build_classifier(self).state_dict(), self.backbone.state_dict()
        renamed = rename_keys(known, own)
        faults = [f"{key} is missing" for key in renamed if key not in given]
        faults += [f"{key} is surplus" for key in given if key not in known]
        faults += [
            f"{key} is {tuple(given[key].shape)}, must be {tuple(own[name].shape)}"
            for key, name in renamed.items()
            if key in given and given[key].shape != own[name].shape
        ]
        if faults:
            arguments = "".join(f", {name}={value!r}" for name, value in self.backbone_args.items())
            raise ValueError(
                f"the weights are not those of {self.backbone_name}: {shorten_list(faults)}; take those of "
                f'timm.create_model("{self.backbone_name}"{arguments}), or build this model with their backbone'
            )
        self.backbone.load_state_dict({name: given[key] for key, name in renamed.items()})
        taken = [f"backbone.{name}" for name in renamed.values()]
        return TakenWeights(
            taken=tuple(taken),
            left=tuple(key for key in given if key not in renamed),
            new=tuple(key for key in self.state_dict() if key not in set(taken)),
        )


def is_fixed_size(backbone: str) -> bool:
    """Whether a model of timm's is built for images of one size, unless told otherwise."""
    cfg = get_pretrained_cfg(backbone)
    return cfg is not None and cfg.fixed_input_size


def create_features(backbone: str, backbone_args: Mapping[str, Any]) -> nn.Module:
    """A model of timm's that returns its maps, and takes images of any size if it can.

    Raises:
        ValueError: for a name that timm does not know, or arguments that say where weights come from.
    """
    if not timm.is_model(backbone):
        raise make_unknown_error("backbone", backbone, timm.list_models())
    if foreign := sorted(backbone_args.keys() & FACTORY_ARGUMENTS):
        raise ValueError(
            f"backbone_args holds {', '.join(foreign)}: only the backbone's own arguments may be in it; load weights "
            "with take_weights"
        )
    options = ANY_SIZE if is_fixed_size(backbone) and not backbone_args.keys() & set(INPUT_SIZES) else ({},)
    for option in options[:-1]:
        try:
            return timm.create_model(backbone, features_only=True, **backbone_args, **option)
        except TypeError as error:
            if next(iter(option)) not in str(error):
                raise
    return timm.create_model(backbone, features_only=True, **backbone_args)


def build_classifier(model: DenseModel) -> nn.Module:
    """The classification model of a dense model's backbone, without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(model.backbone_name, **{**model.backbone_args, "in_chans": model.in_chans})


def rename_keys(keys: Sequence[str] | Mapping[str, Any] | set[str], own: Mapping[str, Any]) -> dict[str, str]:
    """What keys of a classification model are called in a model of its maps, for those which that one has."""
    renamed = {}
    for key in keys:
        names = (key, key.replace(".", "_", 1), *(f"{wrapper}{key}" for wrapper in WRAPPERS))
        found = [name for name in names if name in own]
        if found:
            renamed[key] = found[0]
    return renamed


def create_dense(family: type[DenseT], name: str, pretrained: bool, **model_args: Any) -> DenseT:
    """A dense model made by timm's factory, described by the backbone's preprocessing unless a description is given.

    Raises:
        UnknownArgumentError: for an argument that neither the family nor the factory knows.
        ValueError: for `features_only`: take the backbone's own.
        RuntimeError: for pretrained=True, since no weights are hosted.
    """
    own = [*inspect.signature(family.__init__).parameters][1:]  # without self
    for given in model_args:
        if given not in own and given not in BUILDER_ARGUMENTS:
            raise UnknownArgumentError(str(make_unknown_error(f"argument of {name}", given, own)))
    if model_args.get("features_only"):
        raise ValueError(f"{name} has no features_only: build its backbone with it instead")
    described = not isinstance(model_args.get("pretrained_cfg"), str | None)
    try:
        model = build_model_with_cfg(family, name, pretrained, **model_args)
    except RuntimeError as error:
        if str(error).startswith("No pretrained weights exist"):
            raise RuntimeError(
                f"No pretrained weights exist for {name} yet: use pretrained=False, and take_weights for those of a "
                "classification model"
            ) from error
        raise
    if not described:
        own_cfg = cast("dict[str, Any]", model.backbone.pretrained_cfg)
        model.pretrained_cfg.update({key: own_cfg[key] for key in PREPROCESSING})
        model.pretrained_cfg["license"] = own_cfg.get("license") or model.pretrained_cfg["license"]
    names = model.classifiers
    layers = {"first_conv": model.find_first_conv(), "classifier": names[0] if len(names) == 1 else names}
    model.pretrained_cfg.update(layers)
    forget_other_labels(model)
    return model


def make_dense_cfg(**changes: Any) -> dict[str, Any]:
    """timm's description of a dense model: whole images, without hosted weights."""
    return {
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "mit",
        **changes,
    }


def init_output(layer: nn.Conv2d | nn.Linear, std: float = 0.01, bias: float = 0.0) -> nn.Module:
    """Draws the weights of a last layer, and sets its bias; returns the layer."""
    assert layer.bias is not None
    nn.init.normal_(layer.weight, std=std)
    nn.init.constant_(layer.bias, bias)
    return layer
