"""Real trainings, put down in the middle of an epoch: every later loss is the one of a run that nobody interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import sire
import torch
from measure import MIB, region_bytes
from torch import nn
from torch.nn import functional

STEPS = 6
WORDS, LENGTH, WIDTH = 211, 24, 64

Batch = tuple[torch.Tensor, torch.Tensor]


class Transformer(nn.Module):
    """Guesses the next word: embedding, two causal layers with dropout, a head that shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(self.words(words) + self.places, mask=self.mask, is_causal=True)
        return functional.linear(self.norm(hidden), self.words.weight).flatten(0, 1)


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.deep = nn.Sequential(
            nn.Conv2d(entering, leaving, 3, stride, 1, bias=False),
            nn.BatchNorm2d(leaving),
            nn.ReLU(),
            nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False),
            nn.BatchNorm2d(leaving),
        )
        same = entering == leaving and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(entering, leaving, 1, stride, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.deep(image) + self.around(image))


def resnet() -> nn.Module:
    """A ResNet with three stages; batch normalisation keeps statistics, which are state as well."""
    stages = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def sentences() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(3)
    while True:
        words = torch.randint(WORDS, (8, LENGTH + 1), generator=generator)
        yield words[:, :-1], words[:, 1:].flatten()


def images() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(4)
    while True:
        yield torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Iterator[Batch]]]] = {
    "transformer": (Transformer, sentences),
    "resnet": (resnet, images),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Pauses:
    """Puts everything of a tag down and takes it up again, and looks whether memory went."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.given_back = 0

    def __call__(self) -> None:
        before = region_bytes(self.tag)["resident_bytes"]
        sire.pause(self.tag)
        figures = region_bytes(self.tag)
        assert (figures["resident_bytes"], figures["paused_bytes"]) == (0, before)
        self.given_back += before
        sire.resume(self.tag)


def nothing() -> None:
    """An uninterrupted run."""


def train(name: str, tag: str, interrupt: Callable[[], None]) -> list[str]:
    """The exact losses of a training inside a region; `interrupt` is called in the middle of steps and between them."""
    make, batches = MODELS[name]
    torch.manual_seed(1)
    losses = []
    with sire.region(tag, backup="cpu"):
        network = make().cuda().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step, (given, wanted) in enumerate(itertools.islice(batches(), STEPS)):
        with sire.region(tag, backup="cpu"):
            loss = functional.cross_entropy(network(given.cuda()), wanted.cuda())
        if step == 2:
            interrupt()  # With all activations that the backward pass needs.
        with sire.region(tag, backup="cpu"):
            optimizer.zero_grad()
            loss.backward()
        if step == 3:
            interrupt()  # With gradients.
        with sire.region(tag, backup="cpu"):
            optimizer.step()
        if step in (1, 4):
            interrupt()  # With the optimizer's moments.
        losses.append(loss.item().hex())
    return losses


def test_losses_are_those_of_an_uninterrupted_run(model: str, tag: str) -> None:
    alone = train(model, f"{tag}/alone", nothing)
    assert len(set(alone)) == STEPS, "it learns nothing"
    pauses = Pauses(f"{tag}/interrupted")
    assert train(model, f"{tag}/interrupted", pauses) == alone
    assert pauses.given_back >= 4 * 2 * MIB


def train_captured(name: str, tag: str, interrupt: Callable[[], None]) -> list[str]:
    """The same with the whole step, forward to AdamW, in one CUDA graph."""
    make, batches = MODELS[name]
    torch.manual_seed(1)
    with sire.region(tag, backup="cpu"):
        network = make().cuda().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, capturable=True)
        source = batches()
        given, wanted = (part.cuda() for part in next(source))

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = functional.cross_entropy(network(given), wanted)
            loss.backward()
            optimizer.step()
            return loss

        warming = torch.cuda.Stream()
        warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warming):
            step(), step()
        torch.cuda.current_stream().wait_stream(warming)
    graph = torch.cuda.CUDAGraph()
    with sire.cuda_graph(graph, tag=f"{tag}/graph", backup="cpu"):
        loss = step()
    losses = []
    for count, batch in enumerate(itertools.islice(source, STEPS)):
        given.copy_(batch[0])
        wanted.copy_(batch[1])
        graph.replay()
        if count in (1, 3):
            interrupt()
        losses.append(loss.item().hex())
    return losses


def test_a_captured_step_goes_on_where_it_was(model: str, tag: str) -> None:
    alone = train_captured(model, f"{tag}/alone", nothing)
    assert len(set(alone)) == STEPS, "it learns nothing"
    both = [Pauses(f"{tag}/interrupted"), Pauses(f"{tag}/interrupted/graph")]

    def interrupt() -> None:
        for pauses in both:
            pauses()

    assert train_captured(model, f"{tag}/interrupted", interrupt) == alone
    assert all(pauses.given_back > 0 for pauses in both)
