"""The samples at fault as indices into the dataset."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)
from trainers import fit, policy

BAD = {5, 17, 23}


class Numbers(Dataset):
    """Sample i holds i; some are NaN besides."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float("nan") if index in BAD else 1.0])


class Reader(pl.LightningModule):
    """Fails on the bad samples, wherever in the batch they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        while not isinstance(batch, Tensor):
            batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
        batch = batch.reshape(-1, 2)
        return self.layer(batch[:, 1:]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def found(tmp: Path, train: Any, epochs: int = 2, **options: Any) -> list[tuple[int, ...] | None]:
    """The indices of all incidents of a run."""
    guard = policy(tmp, capture={"enabled": False}, budget={"consecutive": 50})
    run = fit(tmp, Reader, train, guard, max_epochs=epochs, **options)
    assert run.incidents
    return [incident.dataset_indices for incident in run.incidents]


class Custom:
    """A batch sampler of the user's own."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(30).tolist()
        sizes = [2, 5, 3, 7, 1, 6, 6]
        for size in sizes:
            yield order[:size]
            del order[:size]

    def __len__(self) -> int:
        return 7

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


LOADERS: dict[str, Any] = {
    "in order": lambda: DataLoader(Numbers(), batch_size=4),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Numbers(), batch_size=7, shuffle=True, drop_last=False),
    "two workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Numbers(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3
    ),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=Custom()),
    "torch's batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 4, drop_last=False)
    ),
    "unbatched": lambda: DataLoader(Numbers(), batch_size=None, shuffle=True),
    "indices at once": lambda: DataLoader(
        Fancy(), sampler=BatchSampler(SequentialSampler(Numbers()), 4, drop_last=False), batch_size=None
    ),
}


class Fancy(Numbers):
    """Takes a list of indices."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.stack([super(Fancy, self).__getitem__(entry) for entry in index])


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(tmp_path: Path, name: str) -> None:
    indices = found(tmp_path, LOADERS[name]())
    assert None not in indices
    assert sorted(index for entry in indices for index in entry) == sorted([*BAD, *BAD])


def test_a_sampler_with_replacement(tmp_path: Path) -> None:
    weights = [1.0 if index in BAD or index < 3 else 0.0 for index in range(30)]
    indices = found(tmp_path, DataLoader(Numbers(), batch_size=3, sampler=WeightedRandomSampler(weights, 12)))
    assert set(indices[0]) <= BAD


def test_subsets_map_to_the_dataset_beneath(tmp_path: Path) -> None:
    inner = Subset(Numbers(), list(range(29, -1, -1)))
    outer = Subset(inner, list(range(0, 30, 2)))  # the odd numbers
    indices = found(tmp_path, DataLoader(outer, batch_size=4, shuffle=True), epochs=1)
    assert sorted(index for entry in indices for index in entry) == [5, 17, 23]


def test_random_split(tmp_path: Path) -> None:
    one, other = torch.utils.data.random_split(Numbers(), [15, 15], torch.Generator().manual_seed(0))
    expected = BAD & set(one.indices)
    assert expected
    indices = found(tmp_path, DataLoader(one, batch_size=5), epochs=1)
    assert {index for entry in indices for index in entry} == expected
    assert expected | (BAD & set(other.indices)) == BAD


def test_concatenated_datasets_count_through(tmp_path: Path) -> None:
    both = ConcatDataset([Subset(Numbers(), [0, 1, 2]), Numbers()])
    indices = found(tmp_path, DataLoader(both, batch_size=4), epochs=1)
    assert sorted(index for entry in indices for index in entry) == [8, 20, 26]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("limit", [1.0, 6])
def test_in_parts_and_windows(tmp_path: Path, accumulate: int, limit: float) -> None:
    indices = found(
        tmp_path,
        DataLoader(Numbers(), batch_size=4, num_workers=1),
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
    )
    assert indices[0] == (5,)
    assert all(len(entry) == 1 and entry[0] in BAD for entry in indices)


def test_a_loader_made_anew_each_epoch(tmp_path: Path) -> None:
    indices = found(tmp_path, LOADERS["shuffled"](), epochs=3, reload_dataloaders_every_n_epochs=1)
    assert sorted(index for entry in indices for index in entry or ()) == sorted([*BAD] * 3)


# -- collate functions of the user's own


def _longest_first(samples: list[Tensor]) -> Any:
    samples = sorted(samples, key=lambda sample: -len(sample))
    lengths = torch.tensor([len(sample) for sample in samples])
    return nn.utils.rnn.pad_sequence(samples, batch_first=True), lengths


def _refilled(samples: list[Tensor]) -> Tensor:
    return torch.stack([*samples[1:], samples[-1]])


def _popped(samples: list[dict[str, Tensor]]) -> Any:
    labels = torch.stack([sample.pop("x") for sample in samples])
    return {"x": labels * 2 - 1, "names": ["a" for _ in samples]}


def _mixed(samples: list[Tensor]) -> Tensor:
    batch = torch.stack(samples)
    return 0.7 * batch + 0.3 * batch.flip(0)


COLLATIONS: dict[str, Any] = {
    "stacked": (torch.stack, lambda x: x),
    "reversed": (lambda samples: torch.stack(samples[::-1]), lambda x: x),
    "refilled": (_refilled, lambda x: x),
    "three of each": (lambda samples: torch.stack([s for s in samples for _ in range(3)]), lambda x: x),
    "in a dictionary": (_popped, lambda x: {"x": x}),
    "scaled": (lambda samples: torch.stack(samples) / 30, lambda x: x),
    "with noise": (lambda samples: torch.stack([s + torch.rand(2) for s in samples]), lambda x: x + random.random()),
}


class Changed(Dataset):
    def __init__(self, change: Any) -> None:
        self.change = change

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        return self.change(Numbers()[index])


@pytest.mark.parametrize("name", COLLATIONS)
def test_rows_are_followed_through_a_collate_function(tmp_path: Path, name: str) -> None:
    collate, change = COLLATIONS[name]
    indices = found(tmp_path, DataLoader(Changed(change), batch_size=5, shuffle=True, collate_fn=collate))
    kept = {index for entry in indices for index in entry or ()}
    assert None not in indices
    assert kept == BAD if name != "refilled" else kept <= BAD  # it drops some


class Sentences(Dataset):
    """Of unequal lengths; a few hold a NaN."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Tensor:
        words = torch.arange(1.0, 2 + index * 7 % 11) + index
        words[-1] = float("nan") if index in BAD else 1.0
        return words


class Speaker(Reader):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0].sum(1, keepdim=True)).mean()


@pytest.mark.parametrize("workers", [0, 2])
def test_sentences_sorted_by_length_and_padded(tmp_path: Path, workers: int) -> None:
    loader = DataLoader(Sentences(), batch_size=5, shuffle=True, collate_fn=_longest_first, num_workers=workers)
    guard = policy(tmp_path, capture={"enabled": False}, budget={"consecutive": 50})
    run = fit(tmp_path, Speaker, loader, guard)
    assert {index for incident in run.incidents for index in incident.dataset_indices} == BAD


class Listener(Reader):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(torch.stack([words.sum(0, keepdim=True) for words in batch])).mean()


def test_sentences_in_a_list_some_as_long_as_the_batch(tmp_path: Path) -> None:
    assert any(len(Sentences()[index]) == 3 for index in BAD)
    loader = DataLoader(Sentences(), batch_size=3, shuffle=True, collate_fn=list)
    guard = policy(tmp_path, capture={"enabled": False}, budget={"consecutive": 50})
    run = fit(tmp_path, Listener, loader, guard)
    assert {index for incident in run.incidents for index in incident.dataset_indices or (None,)} == BAD


def _without_every_third(samples: list[dict[str, Tensor]]) -> Any:
    return default_collate([sample["x"] for sample in samples if sample["place"] % 3])


def test_samples_that_a_collate_function_leaves_out(tmp_path: Path) -> None:
    class Placed(Numbers):
        def __getitem__(self, index: int) -> Any:
            return {"x": super().__getitem__(index), "place": index}

    indices = found(tmp_path, DataLoader(Placed(), batch_size=5, shuffle=True, collate_fn=_without_every_third))
    assert {index for entry in indices for index in entry} == {index for index in BAD if index % 3}


def test_rows_that_are_mixed_of_several_samples_are_none_of_them(tmp_path: Path) -> None:
    assert set(found(tmp_path, DataLoader(Numbers(), batch_size=6, collate_fn=_mixed))) == {None}


def test_to_follow_rows_draws_nothing(tmp_path: Path) -> None:
    collate, change = COLLATIONS["with noise"]
    states = []
    for custom in (collate, lambda samples: collate(samples)):
        torch.manual_seed(3)
        random.seed(3)
        loader = DataLoader(Changed(change), batch_size=5, collate_fn=custom)
        diagnosed = custom is collate
        guard = policy(
            tmp_path, diagnosis={"enabled": diagnosed}, capture={"enabled": False}, budget={"consecutive": 50}
        )
        run = fit(tmp_path, Reader, loader, guard)
        assert any(incident.dataset_indices for incident in run.incidents) == diagnosed
        states.append((random.getstate(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]


def test_a_dataset_that_fails_when_it_is_asked_again(tmp_path: Path) -> None:
    class Once(Numbers):
        def __init__(self) -> None:
            self.seen: set[int] = set()

        def __getitem__(self, index: int) -> Tensor:
            if index in self.seen:
                raise RuntimeError("read already")
            self.seen.add(index)
            return super().__getitem__(index)

    assert set(found(tmp_path, DataLoader(Once(), batch_size=5, collate_fn=torch.stack), epochs=1)) == {None}


# -- where there is nothing to say


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return (Numbers()[index] for index in range(30))


def test_streams(tmp_path: Path) -> None:
    assert set(found(tmp_path, DataLoader(Stream(), batch_size=4))) == {None}


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_loaders(tmp_path: Path, mode: str) -> None:
    loaders = {"a": LOADERS["shuffled"](), "b": LOADERS["in order"]()}
    assert set(found(tmp_path, CombinedLoader(loaders, mode))) == {None}


def test_batches_out_of_order(tmp_path: Path) -> None:
    assert set(found(tmp_path, DataLoader(Numbers(), batch_size=4, num_workers=2, in_order=False))) == {None}


def test_keys_that_are_no_numbers(tmp_path: Path) -> None:
    class Named(Dataset):
        def __getitem__(self, key: str) -> Tensor:
            return Numbers()[int(key)]

        def __len__(self) -> int:
            return 30

    keys = [str(index) for index in range(30)]
    assert set(found(tmp_path, DataLoader(Named(), batch_size=4, sampler=keys))) == {None}


def test_beside_validation(tmp_path: Path) -> None:
    class Validated(Reader):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert len(batch) == 2

    guard = policy(tmp_path, capture={"enabled": False}, budget={"consecutive": 50})
    val = DataLoader(torch.ones(4, 2), batch_size=2)
    run = fit(tmp_path, Validated, LOADERS["shuffled"](), guard, val=val, val_check_interval=2, max_epochs=2)
    assert sorted(i for incident in run.incidents for i in incident.dataset_indices) == sorted([*BAD, *BAD])
