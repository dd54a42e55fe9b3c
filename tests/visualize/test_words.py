import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CTRLTokenizer, PreTrainedTokenizerFast

from d2svse import D2SVSEProcessor
from d2svse.visualize import Words, split_words


@pytest.fixture
def processor():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "play", "##ing", "##ful", "."]
    tokenizer = Tokenizer(models.WordPiece({piece: row for row, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=12, **names)
    processor = D2SVSEProcessor(None)
    processor.tokenizer, processor.max_length = fast, 12
    return processor


def test_pieces_are_joined_to_words_as_they_stand(processor):
    words = split_words(processor, "A playful Dog playing.")
    assert words.texts == ("A", "playful", "Dog", "playing", ".")
    assert words.pieces == ((1,), (2, 3), (4,), (5, 6), (7,))
    assert words.special == (("[CLS]", 0), ("[SEP]", 8))
    assert not words.cut


def test_unknown_words_keep_their_spelling(processor):
    assert split_words(processor, "a $5 zebra 狗").texts == ("a", "$", "5", "zebra", "狗")


def test_a_cut_sentence_says_so(processor):
    words = split_words(processor, "a dog " * 20)
    assert words.cut
    assert len(words) == 10
    assert not split_words(processor, "a dog " * 5).cut


@pytest.mark.parametrize("prompt", ["a dog {}", "{} dog.", "a {}playing"])
def test_the_words_of_a_text_are_found_inside_a_prompt(processor, prompt):
    processor.prompt = prompt
    words = split_words(processor, "A playful Dog ")
    assert words.texts == ("A", "playful", "Dog")
    names = processor.tokenizer.convert_ids_to_tokens(processor.tokenize(["A playful Dog "])[0])
    assert [names[position] for pieces in words.pieces for position in pieces] == ["a", "play", "##ful", "dog"]
    assert words.num_tokens == len(names)
    assert [names[position] for _, position in words.special] == [name for name, _ in words.special]


def test_some_words_are_found_in_any_case():
    words = Words(("A", "dog", "bites", "a", "Dog"), ((0,), (1,), (2,), (3,), (4,)))
    assert words.select(["DOG"]) == [1, 4]
    assert words.select(["bites", "a"]) == [0, 2, 3]
    with pytest.raises(ValueError, match="'cat' is not a word of the text; its words are: A, dog"):
        words.select(["dog", "cat"])


def test_bad_texts_are_refused(processor):
    with pytest.raises(ValueError, match="expected a text"):
        split_words(processor, "  ")


def test_each_token_of_a_tokenizer_in_python_is_a_word(processor, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "dog": 1, "<unk>": 2, "<pad>": 3}))
    (tmp_path / "merges.txt").write_text("#version\nd o\ndo g</w>\n")
    options = {"unk_token": "<unk>", "pad_token": "<pad>"}
    processor.tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), **options)
    words = split_words(processor, "a dog")
    assert words.texts == ("a", "dog")
    assert words.pieces == ((0,), (1,))
    assert not words.cut
    assert split_words(processor, "a dog " * 40).cut
