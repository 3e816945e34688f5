"""Other classes for a tower and its layers, in place."""

from types import MethodType

from torch import nn
from transformers import SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

VIDEO_METHOD = "get_video_features"
# of a tower and of its layers
Classes = tuple[type[nn.Module], type[nn.Module]]
STOCK: Classes = (SiglipVisionModel, SiglipEncoderLayer)


def with_classes(tower: SiglipVisionModel, classes: Classes) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The tower with the first class, its layers with the second."""
    return [(tower, classes[0]), *((layer, classes[1]) for layer in tower.encoder.layers)]


def change_classes(tower: SiglipVisionModel, classes: Classes) -> None:
    """Give a tower and its layers other classes, also where accelerate's hooks keep a `forward` in the module."""
    for module, new in with_classes(tower, classes):
        for name in ("forward", "_old_forward"):
            if isinstance(vars(module).get(name), MethodType):
                setattr(module, name, MethodType(new.forward, module))
        module.__class__ = new
