"""The GRU text backbone, its vocabulary and its word vectors."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from d2svse import D2SVSE, Trainer, evaluate
from d2svse.integrations.onnx import export_onnx, export_programs
from d2svse.models.gru import build_gru, build_tokenizer, read_word_vectors

TEXTS = ["a red dog", "a blue cat runs home", "the dog"]


@pytest.fixture
def gru(train_dataset, tmp_path):
    """A folder with a small GRU that knows the words of the scenes."""
    texts = [text for record in train_dataset.records for text in (*record.captions, record.dense)]
    model, tokenizer, _ = build_gru(texts, hidden_size=16, embedding_size=12)
    model.save_pretrained(tmp_path / "gru")
    tokenizer.save_pretrained(tmp_path / "gru")
    return tmp_path / "gru"


def step(gru, word: np.ndarray, state: np.ndarray) -> np.ndarray:
    """One step of a GRU, gate by gate (Cho et al. 2014)."""
    weights = [getattr(gru, f"{name}_l0").detach().numpy() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    inner = [part.reshape(3, -1, *part.shape[1:]) for part in weights]
    from_word = [inner[0][gate] @ word + inner[2][gate] for gate in range(3)]
    from_state = [inner[1][gate] @ state + inner[3][gate] for gate in range(3)]
    reset, update = (1 / (1 + np.exp(-(from_word[gate] + from_state[gate]))) for gate in (0, 1))
    new = np.tanh(from_word[2] + reset * from_state[2])
    return (1 - update) * new + update * state


def test_the_output_is_the_mean_of_two_recurrences_word_by_word():
    model, tokenizer, _ = build_gru(TEXTS, hidden_size=5, embedding_size=4)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ours = model(encoded["input_ids"], encoded["attention_mask"]).last_hidden_state.detach().numpy()
    table = model.word_embeddings.weight.detach().numpy()
    for row, ids in enumerate(tokenizer(TEXTS)["input_ids"]):
        ahead, back, state = [], [], np.zeros(5)
        for token in ids:
            state = step(model.forward_gru, table[token], state)
            ahead.append(state)
        state = np.zeros(5)
        for token in reversed(ids):
            state = step(model.backward_gru, table[token], state)
            back.insert(0, state)
        assert np.allclose(ours[row, : len(ids)], (np.array(ahead) + np.array(back)) / 2, atol=1e-5)
    without_mask = model(encoded["input_ids"][1:2]).last_hidden_state[0].detach().numpy()
    assert np.allclose(without_mask, ours[1], atol=1e-6)  # the longest text has no padding


def test_the_vocabulary_leaves_out_rare_words():
    assert set(build_tokenizer(TEXTS, min_count=2).get_vocab()) == {
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "dog",
    }
    with pytest.raises(ValueError, match="no word is in the texts 9 times or more"):
        build_tokenizer(TEXTS, min_count=9)


def test_word_vectors_come_from_a_glove_file(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\nof the sea 7 7 7\nred -1.5 0 2e-1\ndog 9 9 9\nzebra 0 0 0\n")
    model, tokenizer, found = build_gru(TEXTS, path, hidden_size=5, embedding_size=50)
    vocabulary, table = tokenizer.get_vocab(), model.word_embeddings.weight
    assert found == 2
    assert table[vocabulary["dog"]].tolist() == [1, 2, 3]  # the first line of a word counts
    assert torch.allclose(table[vocabulary["red"]], torch.tensor([-1.5, 0, 0.2]))
    assert 0 < table[vocabulary["cat"]].abs().max() <= 0.1
    assert not table[tokenizer.pad_token_id].any()
    model.save_pretrained(tmp_path / "gru")
    tokenizer.save_pretrained(tmp_path / "gru")
    loaded = AutoModel.from_pretrained(tmp_path / "gru")
    assert torch.equal(loaded.word_embeddings.weight, table)
    assert AutoTokenizer.from_pretrained(tmp_path / "gru")(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_the_first_line_of_word2vec_is_skipped(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("2 3\ndog 1 2 3\n")
    vectors, width = read_word_vectors(path, ["dog"])
    assert (width, vectors["dog"].tolist()) == (3, [1, 2, 3])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("dog 1 2 3\nred 1 2\n", r"glove.txt:2: expected a word and 3 numbers"),
        ("dog 1 two 3\n", r"glove.txt:1: expected 3 finite numbers after 'dog'"),
        ("dog 1 nan 3\n", r"glove.txt:1: expected 3 finite numbers after 'dog'"),
        ("zebra 1 2 3\n", r"glove.txt: holds none of the 2 words"),
        ("dog\n", r"glove.txt:1: expected a word and its numbers"),
    ],
)
def test_a_broken_file_of_word_vectors_is_named(tmp_path, content, error):
    (tmp_path / "glove.txt").write_text(content)
    with pytest.raises(ValueError, match=error):
        read_word_vectors(tmp_path / "glove.txt", ["dog", "red"])


@pytest.mark.parametrize("similarity", ["cosine", "max-mean", "scan-t2i", "omit"])
def test_both_stages_train_evaluate_save_and_load(
    gru, backbones, make_args, train_dataset, val_dataset, tmp_path, similarity
):
    model = D2SVSE.from_backbones(backbones / "vision", gru, embed_dim=24, similarity=similarity)
    before = model.text_encoder.backbone.word_embeddings.weight.detach().clone()
    for stage in ("pretrain", "distill"):
        trainer = Trainer(model, make_args(stage, max_steps=2, save_strategy="no"), train_dataset, val_dataset)
        trainer.train()
    assert not torch.equal(model.text_encoder.backbone.word_embeddings.weight.cpu(), before)
    model.save_pretrained(tmp_path / "model")
    loaded = D2SVSE.from_pretrained(tmp_path / "model")
    texts = ["a red circle", "a small red circle left of a large blue square"]
    assert np.allclose(loaded.encode_text(texts), model.encode_text(texts), atol=1e-6)
    alone = np.concatenate([loaded.encode_text([text]) for text in texts])
    assert np.allclose(loaded.encode_text(texts), alone, atol=1e-5)
    assert evaluate(loaded, val_dataset).metrics == evaluate(model, val_dataset).metrics


def test_onnx_of_a_gru_gives_what_the_model_gives(gru, backbones, val_dataset, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra [onnx]")
    import onnxruntime

    model = D2SVSE.from_backbones(backbones / "vision", gru, embed_dim=24, text_pooling="esa").eval()
    export_onnx(model, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "text_encoder.onnx")
    for texts in (["a red circle"], val_dataset.captions[:7]):
        inputs = {name: part.numpy() for name, part in model.processor(text=texts).items() if name != "token_type_ids"}
        embeddings, words = session.run(["embeddings", "tokens"], inputs)
        features = model.encode_text(texts, output="features")
        np.testing.assert_allclose(embeddings, features.pooled.numpy(), atol=1e-5)
        real = features.real_tokens().numpy()
        np.testing.assert_allclose(words[real], features.tokens.numpy()[real], atol=1e-5)
    assert isinstance(model.text_encoder.backbone.forward_gru, torch.nn.GRU)
    with pytest.raises(ValueError, match="fixes the length of the texts of a GRU; export the model to ONNX"):
        export_programs(model)
