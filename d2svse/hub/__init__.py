"""The Hugging Face Hub and model folders: fetch, check, push, and write model cards."""

from typing import TYPE_CHECKING

from d2svse.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "card": ["CardFacts"],
        "push": ["Pushed", "make_repository", "push_folder"],
    },
)

if TYPE_CHECKING:
    from d2svse.hub.card import CardFacts as CardFacts
    from d2svse.hub.push import Pushed as Pushed
    from d2svse.hub.push import make_repository as make_repository
    from d2svse.hub.push import push_folder as push_folder
