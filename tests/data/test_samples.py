from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from d2svse.data import Batch, Collator, EpochBatches, ImageTextDataset, TrainingSamples, augment
from d2svse.data.collate import Sample
from d2svse.data.samples import Draw
from d2svse.images import ImageError


@pytest.fixture
def make(train_dataset, processor):
    return lambda **options: TrainingSamples(train_dataset, processor, **{"num_image_tokens": 17, "seed": 3, **options})


def same(a, b):
    def equal(one, two):
        if torch.is_tensor(one):
            return torch.equal(one, two)
        return same(one, two) if isinstance(one, Sample | Batch) else one == two

    return all(equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(make):
    samples = make()
    assert same(samples[Draw(2, 5)], make()[Draw(2, 5)])
    assert not same(samples[Draw(2, 5)], samples[Draw(3, 5)])
    assert not same(samples[Draw(2, 5)], make(seed=4)[Draw(2, 5)])


def test_one_caption_an_epoch_or_all_of_them(make, train_dataset):
    plain = {"augment_words": False, "augment_images": False, "num_image_tokens": None}
    samples = make(**plain)
    assert len(samples) == len(train_dataset)
    seen = {tuple(samples[Draw(epoch, 0)].input_ids) for epoch in range(40)}
    assert len(seen) == len(set(train_dataset.records[0].captions))
    every = make(captions_per_epoch="all", **plain)
    assert len(every) == len(train_dataset.captions)
    ids = [every[Draw(0, index)].input_ids for index in range(len(every))]
    assert ids == every.processor.tokenize(train_dataset.captions)
    assert [every[Draw(0, i)].image_id for i in range(len(every))] == train_dataset.image_of_caption.tolist()


def test_dense_text_is_one_an_image_and_cut_at_the_length_asked(make, train_dataset):
    samples = make(text="dense", augment_words=False, max_length=9)
    assert len(samples) == len(train_dataset)
    assert len(samples[0].input_ids) == 9


@pytest.mark.parametrize("prompt", ["a photo of {}", "{} seen from above", None])
def test_captions_are_trained_in_the_prompt_that_they_are_searched_with(make, train_dataset, monkeypatch, prompt):
    samples = make(captions_per_epoch="all", augment_words=False)
    monkeypatch.setattr(samples.processor, "prompt", prompt)
    whole = samples.processor.tokenize(train_dataset.captions[:8])
    assert [samples[row].input_ids for row in range(8)] == whole
    samples.augment_words = True
    monkeypatch.setattr(augment, "WORD_PROBABILITY", 1.0)  # every word of the caption changes, and none of the prompt
    monkeypatch.setattr(augment, "MASK_SHARE", 1.0)
    of_prompt = prompt.replace("{}", "").split() if prompt else []
    tokenizer = samples.processor.tokenizer
    for row in range(8):
        kept = [token for token in samples[row].input_ids if token != tokenizer.mask_token_id]
        expected = tokenizer.convert_tokens_to_ids([tokenizer.cls_token, *of_prompt, tokenizer.sep_token])
        assert kept == expected
        assert len(samples[row].input_ids) == len(whole[row])


def test_teacher_embeddings_go_with_their_image(make, train_dataset):
    embeddings = torch.arange(len(train_dataset)).float()[:, None]
    batch = Collator(0)([make(teacher_embeddings=embeddings)[Draw(0, i)] for i in (4, 2)])
    assert batch.teacher_embeds.tolist() == [[4], [2]]
    assert batch.image_ids.tolist() == [4, 2]


def test_a_batch_is_padded_to_its_own_longest(make):
    samples = [make()[Draw(0, index)] for index in range(6)]
    batch = Collator(7)(samples)
    assert batch.input_ids.shape[1] == max(len(sample.input_ids) for sample in samples)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        assert batch.input_ids[row, :n].tolist() == sample.input_ids
        assert (batch.input_ids[row, n:] == 7).all()
        assert batch.attention_mask[row].sum() == n
    assert batch.image_token_mask.shape == (6, 17)


def test_the_order_is_a_permutation_that_changes_with_the_epoch():
    sampler = EpochBatches(20, 20, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        draws = next(iter(sampler))
        assert {draw.epoch for draw in draws} == {epoch}
        assert sorted(draw.index for draw in draws) == list(range(20))
        orders.append(draws)
        assert [draws] == list(sampler)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("unimodal", [None, "text"])
def test_workers_change_nothing(make, workers, unimodal):
    def batches(num_workers):
        sampler, samples = EpochBatches(48, 8, 0), make(unimodal=unimodal, num_image_tokens=None)
        return list(DataLoader(samples, batch_sampler=sampler, collate_fn=Collator(0), num_workers=num_workers))

    for a, b in zip(batches(0), batches(workers), strict=True):
        assert same(a, b)


def test_a_picture_that_breaks_later_is_named_with_its_line(make, train_dataset, tmp_path):
    samples = make()
    samples.dataset = type(train_dataset)([replace(train_dataset.records[0], image=tmp_path / "gone.png")], "m.jsonl")
    with pytest.raises(ImageError, match=r"m\.jsonl:1: .*gone\.png: no such image"):
        samples[Draw(0, 0)]


def test_a_picture_of_a_source_without_lines_is_named_without_one(train_dataset, processor, tmp_path):
    record = replace(train_dataset.records[0], image=tmp_path / "gone.png", line=0)  # as those of Karpathy's JSON
    samples = TrainingSamples(ImageTextDataset([record], "dataset_coco.json"), processor)
    with pytest.raises(ImageError, match=r"^dataset_coco\.json: .*gone\.png: no such image"):
        samples[Draw(0, 0)]


def test_replacements_hold_no_special_token(make):
    samples = make()
    assert not np.isin(samples.processor.tokenizer.all_special_ids, samples.replacements).any()


@pytest.mark.parametrize("length", [1, 3, 17, 24])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one(length, world_size):
    whole = list(EpochBatches(length, 8, seed=5))
    shares = [
        list(EpochBatches(length, 8 // world_size, 5, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert [draw for part in parts for draw in part if draw.valid] == batch
        assert all(parts)  # nobody is left without work
        sizes = [sum(draw.valid for draw in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_an_uneven_last_batch_can_be_dropped():
    assert [len(batch) for batch in EpochBatches(17, 8, 0)] == [8, 8, 1]
    batches = EpochBatches(17, 8, 0, drop_last=True)
    assert [len(batch) for batch in batches] == [8, 8]
    assert len(batches) == 2


def test_no_two_captions_of_an_image_in_a_batch():
    image_of_row = np.repeat(np.arange(10), [5, 5, 1, 2, 5, 5, 5, 5, 5, 5])
    batches = EpochBatches(len(image_of_row), 4, 0, image_of_row=image_of_row)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        rows = [[draw.index for draw in batch] for batch in batches]
        assert len(rows) == len(batches)
        assert sorted(row for batch in rows for row in batch) == list(range(len(image_of_row)))
        assert all(len(set(image_of_row[batch])) == len(batch) for batch in rows)
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def test_a_sample_that_only_keeps_a_process_busy_is_not_valid(make):
    samples = make(teacher_embeddings=torch.zeros(48, 3))
    batch = Collator(0)([samples[Draw(0, 5)], samples[Draw(0, 5, valid=False)]])
    assert batch.valid.tolist() == [True, False]
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    assert {len(tensor) for tensor in tensors if tensor is not None} == {2}


def test_a_batch_is_cut_into_rows_and_chunks(make):
    batch = Collator(0)([make()[Draw(0, index)] for index in range(5)])
    assert same(
        batch[torch.tensor([3, 1])],
        Batch(
            **{
                field.name: None if (tensor := getattr(batch, field.name)) is None else tensor[[3, 1]]
                for field in fields(batch)
            }
        ),
    )
    parts = list(batch.chunks(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.cat([part.pixel_values for part in parts]).equal(batch.pixel_values)
    assert all(part.teacher_embeds is None for part in parts)


def test_a_batch_moves_to_a_device_as_accelerate_moves_it(make):
    batch = Collator(0)([make()[Draw(0, index)] for index in range(2)])
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert isinstance(moved, Batch)
    assert moved.pixel_values.device == moved.image_ids.device == torch.device("meta")
    assert moved.valid.equal(batch.valid)  # what the CPU asks for stays there


def test_a_batch_is_pinned_as_a_data_loader_pins_it(make, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor), tensor)[1])
    batch = Collator(0)([make()[Draw(0, index)] for index in range(2)])
    assert same(pin_memory(batch), batch)
    assert len(pinned) == 7


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("image_of_row", [None, np.repeat(np.arange(9), [3, 1, 1, 5, 2, 1, 1, 4, 1])])
def test_the_count_of_batches_is_right_and_draws_nothing(drop_last, image_of_row, monkeypatch):
    for size, processes in ((2, 1), (4, 2), (5, 1), (20, 1)):
        options = {"world_size": processes, "drop_last": drop_last, "image_of_row": image_of_row}
        batches = EpochBatches(19, size, 0, **options)
        listed = len(list(batches))
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "default_rng", None)
            assert len(batches) == listed


@pytest.fixture
def identified(train_dataset, processor):
    """Samples of one side: each four images have an identity, and the last has one of its own."""
    count = len(train_dataset)
    names = [f"p{row // 4}" if row < count - 1 else "alone" for row in range(count)]
    records = [replace(record, identity=name) for record, name in zip(train_dataset.records, names, strict=True)]
    dataset = ImageTextDataset(records, "here.jsonl")
    return lambda side, **options: TrainingSamples(dataset, processor, seed=3, unimodal=side, **options)


@pytest.mark.parametrize("epoch", [0, 1])
def test_images_are_paired_with_others_of_their_identity(identified, epoch):
    samples, again = identified("image", num_image_tokens=17), identified("image", num_image_tokens=17)
    for row in (0, 5, 47, 46):
        sample = samples[Draw(epoch, row)]
        assert same(sample, again[Draw(epoch, row)])
        assert sample.image_id == row
        assert sample.input_ids == sample.second.input_ids == []
        assert sample.identity == sample.second.identity == samples.identity_of_row[row]
        assert (sample.second.image_id == row) == (row == 47)  # the lone one
        assert sample.second.image_id // 4 == row // 4
        assert not torch.equal(sample.pixel_values, sample.second.pixel_values)
    assert len({samples[Draw(one, 0)].second.image_id for one in range(20)}) == 3
    assert identified("image", captions_per_epoch="all").image_of_row is None


@pytest.mark.parametrize("captions", ["one", "all"])
def test_texts_are_paired_with_others_of_their_identity(identified, train_dataset, captions):
    plain = {"augment_words": False, "captions_per_epoch": captions}
    samples, owner = identified("text", **plain), train_dataset.image_of_caption
    for row in range(0, len(samples), 7):
        sample = samples[Draw(2, row)]
        assert sample.pixel_values is None
        assert sample.second.caption_id != sample.caption_id
        assert owner[sample.second.caption_id] // 4 == owner[sample.caption_id] // 4
        assert owner[sample.second.caption_id] == sample.second.image_id
        for view in (sample, sample.second):
            assert view.input_ids == samples.processor.tokenize([train_dataset.captions[view.caption_id]])[0]
        assert sample.identity == samples.identity_of_row[row]
    without = TrainingSamples(train_dataset, samples.processor, unimodal="text", **plain)
    assert {without[row].second.image_id for row in range(5)} == {without[row].image_id for row in range(5)}


def test_both_views_of_a_batch_have_texts_of_one_length(identified):
    samples = [identified("text")[Draw(0, row)] for row in range(6)]
    batch = Collator(7)(samples)
    assert batch.input_ids.shape == batch.second.input_ids.shape
    assert batch.second.caption_ids.tolist() == [sample.second.caption_id for sample in samples]
    assert batch.identities.tolist() == [sample.identity for sample in samples]
    both = batch[2:4].both_views()
    assert both.input_ids.equal(torch.cat([batch.input_ids[2:4], batch.second.input_ids[2:4]]))
    assert both.second is None
    moved = batch.to("meta")
    assert moved.second.input_ids.device.type == "meta"
    assert not moved.second.valid.is_meta


@pytest.mark.parametrize("length", [None, 64])
def test_samples_without_texts_are_not_padded(identified, length):
    """The text tower of a model of fixed length would encode nothing but padding."""
    images, texts = (Collator(7, length)([identified(side)[row] for row in range(4)]) for side in ("image", "text"))
    assert images.input_ids.shape == images.second.attention_mask.shape == (4, 0)
    assert texts.input_ids.shape == texts.second.input_ids.shape
    assert texts.input_ids.shape[1] == (length or int(texts.both_views().attention_mask.sum(1).max()))


def test_an_image_without_identity_is_named(train_dataset, processor):
    with pytest.raises(ValueError, match=r'train\.jsonl:1: expected "identity", which is missing'):
        TrainingSamples(train_dataset, processor, unimodal="image")
