import json

import pytest

from d2svse import D2SVSE, D2SVSEConfig
from d2svse.hub.card import _similarity as tag_of
from d2svse.models import model_fingerprint
from d2svse.published import write_published
from d2svse.retrieval import ImageTextIndex
from d2svse.serving.asking import Searcher
from d2svse.similarity import build_similarity

FORMS = ["omit", {"name": "omit"}]


def test_a_similarity_by_name_is_the_one_by_dictionary(make_model):
    named, whole = (make_model(similarity=form) for form in FORMS)
    assert named.config.similarity == whole.config.similarity == {"name": "omit"}
    assert model_fingerprint(named) == model_fingerprint(whole)
    assert type(named.similarity_fn) is type(build_similarity("omit"))


@pytest.mark.parametrize("form", [None, {}, "cosine", {"name": "cosine"}])
def test_no_similarity_is_cosine(form):
    assert D2SVSEConfig(similarity=form).similarity == {"name": "cosine"}


def test_a_similarity_that_is_set_later_is_kept_in_the_same_form():
    config = D2SVSEConfig()
    config.similarity = "max-sum"
    assert config.similarity == {"name": "max-sum"}
    assert D2SVSEConfig.from_dict({**config.to_dict(), "similarity": "scan-t2i"}).similarity == {"name": "scan-t2i"}


@pytest.mark.parametrize("form", [3, ["omit"], {"top": 1}, {"name": None}])
def test_what_names_no_similarity_is_told(form):
    with pytest.raises(ValueError, match=r"similarity must be a name such as \"omit\""):
        D2SVSEConfig(similarity=form)


@pytest.mark.parametrize("most", [0, -1.0, float("nan")])
def test_a_largest_logit_scale_that_is_not_positive_is_refused(most):
    with pytest.raises(ValueError, match="max_logit_scale must be positive"):
        D2SVSEConfig(max_logit_scale=most)


def test_backbones_are_joined_with_a_similarity_by_name(backbones):
    model = D2SVSE.from_backbones(backbones / "vision", backbones / "text", embed_dim=24, similarity="max-mean")
    assert model.config.similarity == {"name": "max-mean"}


def test_a_folder_that_was_saved_with_the_name_alone_opens_everywhere(make_model, val_dataset, tmp_path):
    make_model(similarity="omit").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    saved = json.loads(file.read_text())
    assert saved["similarity"] == {"name": "omit"}
    file.write_text(json.dumps({**saved, "similarity": "omit"}))
    model = D2SVSE.from_pretrained(tmp_path / "model")
    assert model.config.similarity == {"name": "omit"}
    assert tag_of(json.loads(file.read_text())) == "omit"
    index = ImageTextIndex.build(model, val_dataset.images[:4], tmp_path / "index")
    assert Searcher(index).similarity == "omit"
    with pytest.raises(ValueError, match="published"):
        write_published(tmp_path / "model", tmp_path / "model.pth")
