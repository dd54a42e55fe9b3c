"""Tokenizers that have more tokens than the backbone has embeddings, or do not tell words."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizer

from d2svse import D2SVSEProcessor, Trainer
from d2svse.data import augment


@pytest.fixture
def with_added_tokens(make_model):
    """A model whose tokenizer has 50 tokens that its text backbone has no embeddings for."""

    def make(**options):
        model = make_model(**options)
        tokenizer = copy.deepcopy(model.processor.tokenizer)
        model.text_encoder.backbone.resize_token_embeddings(len(tokenizer))
        tokenizer.add_tokens([f"extra{number}" for number in range(50)])
        model.processor = D2SVSEProcessor(model.processor.image_processor, tokenizer, max_length=96)
        return model

    return make


def test_words_are_replaced_by_those_that_have_embeddings(with_added_tokens, make_args, train_dataset, monkeypatch):
    monkeypatch.setattr(augment, "MASK_SHARE", 0.0)
    monkeypatch.setattr(augment, "REPLACE_SHARE", 1.0)
    monkeypatch.setattr(augment, "WORD_PROBABILITY", 1.0)
    model = with_added_tokens()
    count = model.text_encoder.backbone.get_input_embeddings().num_embeddings
    trainer = Trainer(model, make_args("align", num_train_epochs=1, save_strategy="no"), train_dataset)
    seen = np.unique(np.concatenate([trainer.prepare()[row].input_ids for row in range(len(train_dataset))]))
    assert seen.max() < count
    assert len(seen) > 20
    trainer.train()


def test_a_mask_token_without_embedding_is_not_used(with_added_tokens, make_args, train_dataset):
    model = with_added_tokens()
    model.processor.tokenizer.mask_token = "extra3"
    samples = Trainer(model, make_args("align"), train_dataset).prepare()
    assert samples.mask_token_id is None


def test_a_caption_with_a_token_that_has_no_embedding_is_named(with_added_tokens, make_args, train_dataset):
    records = list(train_dataset.records)
    records[5] = replace(records[5], captions=(*records[5].captions, "a red extra7"))
    dataset = type(train_dataset)(records, "train.jsonl")
    with pytest.raises(ValueError, match=rf"^train.jsonl:{records[5].line}: .*'extra7' has none; enlarge them with"):
        Trainer(with_added_tokens(), make_args("align"), dataset).prepare()
    model = with_added_tokens()
    model.processor.tokenizer.pad_token = "extra1"
    with pytest.raises(ValueError, match="its padding token 'extra1' has none"):
        Trainer(model, make_args("align"), train_dataset).prepare()


class PythonTokenizer(PreTrainedTokenizer):
    """Words by a dictionary, in Python."""

    def __init__(self, words, **kwargs):
        self.words = {word: number for number, word in enumerate(words)}
        super().__init__(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]", **kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text, **kwargs):
        return text.lower().split()

    def _convert_token_to_id(self, token):
        return self.words.get(token, self.words["[UNK]"])

    def _convert_id_to_token(self, index):
        return list(self.words)[index]


def test_a_tokenizer_in_python_trains_with_words_augmented(make_model, make_args, train_dataset, caplog):
    model = make_model()
    vocabulary = model.processor.tokenizer.get_vocab()
    tokenizer = PythonTokenizer(sorted(vocabulary, key=vocabulary.get))
    assert not tokenizer.is_fast
    model.processor = D2SVSEProcessor(model.processor.image_processor, tokenizer, max_length=96)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(model, make_args("align", num_train_epochs=1, save_strategy="no"), train_dataset)
        trainer.prepare()
    assert "PythonTokenizer does not say which tokens form a word" in caplog.text
    plain = [tokenizer(record.captions[0])["input_ids"] for record in train_dataset.records]
    made = [trainer.prepare()[row].input_ids for row in range(len(train_dataset))]
    assert any(tokenizer.mask_token_id in ids for ids in made)
    assert min(map(len, made)) >= 1
    assert len(plain) == len(made)
    trainer.train()
