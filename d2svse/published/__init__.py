"""Read, convert and write published D2S-VSE checkpoints (`.pth`)."""

from typing import TYPE_CHECKING

from d2svse.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "convert": ["convert_published", "load_published", "write_published"],
    },
)

if TYPE_CHECKING:
    from d2svse.published.convert import convert_published as convert_published
    from d2svse.published.convert import load_published as load_published
    from d2svse.published.convert import write_published as write_published
