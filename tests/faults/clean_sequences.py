"""Clean recurrent and convolutional models of sequences."""

import torch
from faults.clean_case import (
    ROWS,
    Clean,
    classify,
    labelled,
    labelled_words,
    next_word,
    regress,
    three,
    vectors,
    words,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

STEPS = 6


class TimeFirstRnn(nn.Module):
    """An Elman network on batches of shape (time, rows, features), their default order."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 6, num_layers=2, nonlinearity="relu")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class BidirectionalGru(nn.Module):
    """Words whose padding has no gradient, read both ways, with dropout between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 5, padding_idx=0)
        self.gru = nn.GRU(5, 4, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, sentence: Tensor) -> Tensor:
        _, last = self.gru(self.words(sentence))
        return self.head(torch.cat([last[-2], last[-1]], -1))


class PackedLstm(nn.Module):
    """Sentences of different lengths, packed and padded again, with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True, proj_size=3)
        self.head = nn.Linear(6, 4)

    def forward(self, sentence: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.words(sentence), length, batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=sentence.shape[1]
        )
        return self.head(states)


class Autoregressive(nn.Module):
    """Feeds its own outputs back for several steps, as at prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(3, 8)
        self.first, self.second = nn.LSTMCell(2, 8), nn.GRUCell(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.start(x).tanh()
        cell, other = torch.zeros_like(hidden), hidden.new_zeros(len(x), 6)
        value, values = hidden.new_zeros(len(x), 2), []
        for _ in range(5):
            hidden, cell = self.first(value, (hidden, cell))
            other = self.second(hidden, other)
            value = self.head(other)
            values.append(value)
        return torch.stack(values, 1)


class WaveNet(nn.Module):
    """Gated causal convolutions, dilated by powers of two, with skips (van den Oord 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 6)
        self.filters = nn.ModuleList(nn.Conv1d(6, 6, 2, dilation=2**i) for i in range(5))
        self.gates = nn.ModuleList(nn.Conv1d(6, 6, 2, dilation=2**i) for i in range(5))
        self.skips = nn.ModuleList(nn.Conv1d(6, 5, 1) for _ in range(5))
        self.residuals = nn.ModuleList(nn.Conv1d(6, 6, 1) for _ in range(4))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(5, 5, 1), nn.ReLU(), nn.Conv1d(5, 8, 1))

    def forward(self, sentence: Tensor) -> Tensor:
        x = self.words(sentence).mT
        total = torch.zeros((), device=x.device)
        for i, (filtered, gate, skip) in enumerate(
            zip(self.filters, self.gates, self.skips, strict=True)
        ):
            past = functional.pad(x, (2**i, 0))
            y = filtered(past).tanh() * gate(past).sigmoid()
            total = total + skip(y)
            if i < len(self.residuals):
                x = x + self.residuals[i](y)
        return self.out(total).mT


class TemporalBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, dilation: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv1 = norm(nn.Conv1d(width_in, width_out, 3, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(width_out, width_out, 3, dilation=dilation))
        self.match = nn.Conv1d(width_in, width_out, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv1(self.pad(x)).relu())
        return (self.drop(self.conv2(self.pad(y)).relu()) + self.match(x)).relu()


class TemporalConvNet(nn.Module):
    """Residual causal convolutions with weight norm (Bai 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            TemporalBlock(3, 8, 1), TemporalBlock(8, 8, 2), TemporalBlock(8, 8, 4)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class CharacterCnn(nn.Module):
    """Convolutions of several widths, each with the maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(10, 5, max_norm=None, scale_grad_by_freq=False)
        self.convs = nn.ModuleList(nn.Conv1d(5, 4, width) for width in (1, 2, 3, 4))
        self.highway, self.gate = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text).mT
        y = torch.cat([conv(x).relu().amax(-1) for conv in self.convs], -1)
        share = self.gate(y).sigmoid()
        return self.head(share * self.highway(y).relu() + (1 - share) * y)


class SelectiveScan(nn.Module):
    """A state space whose step sizes depend on the input, scanned in a loop (Gu 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 10), nn.Linear(5, 3)
        self.conv = nn.Conv1d(5, 5, 3, groups=5, padding=2)
        self.select, self.step = nn.Linear(5, 8, bias=False), nn.Linear(5, 5)
        self.log_decay = nn.Parameter(torch.arange(1.0, 5.0).log().repeat(5, 1))
        self.through = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.enter(x).chunk(2, -1)
        u = functional.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        inward, outward = self.select(u).chunk(2, -1)
        step = functional.softplus(self.step(u)).unsqueeze(-1)
        decay = (-step * self.log_decay.exp()).exp()
        drive = step * inward.unsqueeze(-2) * u.unsqueeze(-1)
        state, states = torch.zeros_like(drive[:, 0]), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + drive[:, i]
            states.append((state * outward[:, i].unsqueeze(-2)).sum(-1))
        return self.leave((torch.stack(states, 1) + self.through * u) * functional.silu(gate))


class SpeechCtc(nn.Module):
    """Frames to characters without an alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.gru = nn.GRU(6, 5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 5)

    def forward(self, frames: Tensor) -> Tensor:
        states, _ = self.gru(functional.gelu(self.conv(frames.mT)).mT)
        return self.head(states).log_softmax(-1)


def ctc(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores = model(batch["frames"]).transpose(0, 1)
    losses = functional.ctc_loss(
        scores, batch["text"], batch["frame_count"], batch["text_length"], reduction="none"
    )
    return (losses / batch["text_length"]).mean()


def tag(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    sentence, length, tags = batch
    losses = functional.cross_entropy(model(sentence, length).mT, tags, reduction="none")
    known = torch.arange(sentence.shape[1], device=sentence.device) < length[:, None]
    return ((losses * known).sum(1) / length).mean()


def spoken(g: torch.Generator) -> dict[str, Tensor]:
    return {
        "frames": torch.randn(ROWS, 10, 4, generator=g),
        "frame_count": torch.randint(8, 11, (ROWS,), generator=g),
        "text": torch.randint(1, 5, (ROWS, 3), generator=g),
        "text_length": torch.randint(1, 4, (ROWS,), generator=g),
    }


def tagged(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    length = torch.randint(2, STEPS + 1, (ROWS,), generator=g)
    known = torch.arange(STEPS) < length[:, None]
    sentence = torch.randint(1, 9, (ROWS, STEPS), generator=g) * known
    return sentence, length, torch.randint(4, (ROWS, STEPS), generator=g)


def time_first(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(STEPS, ROWS, 4, generator=g), torch.randint(3, (ROWS,), generator=g)


SEQUENCES = (
    Clean("time_first_rnn", TimeFirstRnn, three(time_first), classify),
    Clean("bidirectional_gru", BidirectionalGru, labelled_words(9, 3, STEPS), classify),
    Clean("packed_lstm", PackedLstm, three(tagged), tag),
    Clean("autoregressive", Autoregressive, vectors((3,), (5, 2)), regress),
    Clean("wavenet", WaveNet, words(8, 9), next_word),
    Clean("temporal_convnet", TemporalConvNet, labelled(3, 3, 8), classify),
    Clean("character_cnn", CharacterCnn, labelled_words(10, 3, 7), classify),
    Clean("selective_scan", SelectiveScan, vectors((5, 3), (5, 3)), regress),
    Clean("speech_ctc", SpeechCtc, three(spoken), ctc),
)
