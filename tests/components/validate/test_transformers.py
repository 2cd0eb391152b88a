"""A BERT and a ViT of the transformers library, drawn at random: clean, and with one fault each."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, GradientReport, Verdict

WORDS, LENGTH, CLASSES, ROWS = 20, 6, 3, 4
BERT_FAULTY = "bert.encoder.layer.1.attention.output"
VIT_FAULTY = "vit.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The library, with no way to the network and its caches in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield pytest.importorskip("transformers")


@pytest.fixture
def bert(transformers: ModuleType) -> nn.Module:
    """Two layers of width 8; larger initial weights than the default keep the test sharp."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).train()


@pytest.fixture
def vit(transformers: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.1,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return transformers.ViTForImageClassification(config).train()


def sentences() -> list[dict[str, Tensor]]:
    """Padded sentences with two segments."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        length = torch.randint(3, LENGTH + 1, (ROWS, 1), generator=generator)
        known = (torch.arange(LENGTH) < length).long()
        words = torch.randint(1, WORDS, (ROWS, LENGTH), generator=generator)
        batches.append(
            {
                "input_ids": words * known,
                "attention_mask": known,
                "token_type_ids": (torch.arange(LENGTH) >= 2).long() * known,
                "labels": torch.randint(CLASSES, (ROWS,), generator=generator),
            }
        )
    return batches


def pictures() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator),
            "labels": torch.randint(CLASSES, (ROWS,), generator=generator),
        }
        for _ in range(3)
    ]


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the library computes itself."""
    return model(**batch).loss


class Louder(torch.autograd.Function):
    """The identity; its gradient is one hundredth too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0] * 1.01


def louder(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return Louder.apply(output)


def detach_output(model: nn.Module) -> None:
    """Stop the gradient between the second layer's attention and its output projection."""
    faulty = model.get_submodule(BERT_FAULTY)
    right = type(faulty)

    class Detached(right):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return super().forward(hidden_states.detach(), input_tensor)

    faulty.__class__ = Detached


def failing(report: GradientReport) -> dict[str, Cause]:
    return {t.name: t.cause for t in report.tensors if t.verdict is Verdict.FAIL}


def assert_clean(report: GradientReport) -> None:
    bad = [check for check in report.checks if not check.passed]
    assert report.passed, (report.reason, failing(report), bad)
    assert {t.verdict for t in report.tensors} == {Verdict.PASS}
    assert report.forwards <= 2 * len(report.tensors) + 10


def test_bert_is_clean(bert: nn.Module) -> None:
    report = verify_gradients(bert, own_loss, sentences())
    assert len(report.tensors) == len(list(bert.parameters())) == 41
    assert_clean(report)


def test_vit_is_clean(vit: nn.Module) -> None:
    report = verify_gradients(vit, own_loss, pictures())
    assert len(report.tensors) == len(list(vit.parameters())) == 40
    assert_clean(report)


def test_a_detach_in_the_second_layer_of_bert_is_found(bert: nn.Module) -> None:
    detach_output(bert)
    report = verify_gradients(bert, own_loss, sentences())
    assert not report.passed
    assert report.culprit == BERT_FAULTY
    causes = failing(report)
    inside = "bert.encoder.layer.1.attention.self."
    assert causes[inside + "query.weight"] is Cause.BROKEN_PATH
    assert causes[inside + "value.weight"] is Cause.BROKEN_PATH
    # The residual connection leaves those upstream a gradient, only not all of it.
    assert causes["bert.embeddings.word_embeddings.weight"] is Cause.MISMATCH
    # Nothing downstream is accused.
    downstream = ("bert.encoder.layer.1.output", "bert.encoder.layer.1.inter", "bert.p", "class")
    assert [name for name in causes if name.startswith((BERT_FAULTY, *downstream))] == []


def test_a_wrong_scale_in_the_second_layer_of_vit_is_found(vit: nn.Module) -> None:
    vit.get_submodule(VIT_FAULTY).register_forward_hook(louder)
    report = verify_gradients(vit, own_loss, pictures())
    assert not report.passed
    assert report.culprit == VIT_FAULTY
    causes = failing(report)
    assert {causes[VIT_FAULTY + end] for end in (".weight", ".bias")} == {Cause.MISMATCH}
    assert [n for n in causes if n.startswith(("vit.layers.1.mlp.fc2", "vit.layern", "cl"))] == []
