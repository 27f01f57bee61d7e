"""Tests of contextclip.py and fewshot.py: `python -m pytest`. Offline, on the CPU, a minute."""

import copy
import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont

import contextclip as cc
import fewshot as fs

HERE = Path(__file__).parent
SMALL = "--steps 40 --batch-size 16 --width 16 --float32 --cpu".split()
SETTINGS = {"steps": 40, "batch_size": 16, "width": 16, "float32": True}
close = torch.testing.assert_close
exact = partial(close, rtol=0, atol=0)
user_error = partial(pytest.raises, cc.UserError)
interrupted = partial(pytest.raises, ZeroDivisionError)
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cards():
    """The typefaces are drawn once for all tests, in which every twentieth step is logged."""
    drawn = cc.draw_typefaces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cc, "draw_typefaces", lambda: drawn)
        patch.setattr(cc, "EVERY", 20)
        patch.setattr("torch.hub.download_url_to_file", None)  # offline
        yield cc.Cards("cpu", cc.Settings())


def make_model(data=None, **changes):
    """A new model, with the words of Cards or Photos."""
    torch.manual_seed(0)
    vocabulary = data.vocabulary if data else cc.build_vocabulary(["a b c d"])
    model = cc.ContextCLIP(cc.Settings(**SETTINGS | changes), vocabulary)
    return model.eval().requires_grad_(False)


def train(source, out, objective="clixp", **changes):
    """A small run -> what it saved."""
    out.mkdir(parents=True, exist_ok=True)
    cc.train(cc.Settings(objective, **SETTINGS | changes), source, out)
    return cc.read_checkpoint(out / f"{objective}.pt")


def run(*arguments, program=cc):
    """The command line, in this process."""
    small = SMALL if program is cc else ["--cpu"]
    program.main([*small, *map(str, arguments)])


def refuse(capsys, *arguments, program=cc):
    """The one line with which the command ends, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*arguments, program=program)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def start_process(*command, **options):
    """python COMMAND in a process of its own, which finds contextclip."""
    options["env"] = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    options["stdout"] = options["stderr"] = subprocess.PIPE
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, **options)


def spy(patch, owner, name):
    """A list of (arguments, result) of all calls of owner.name from now on."""
    calls, function = [], getattr(owner, name)

    def watched(*given):
        calls.append((given, function(*given)))
        return calls[-1][1]

    patch.setattr(owner, name, watched)
    return calls


def change_batches(patch, data, change):
    """From now on the n-th batch is change(n, images, tokens)."""
    calls = spy(patch, data, "draw_batch")
    draw = data.draw_batch
    patch.setattr(data, "draw_batch", lambda *given: change(len(calls) + 1, *draw(*given)))


def stop_at(step):
    """For change_batches: this batch raises an error."""
    return lambda n, *batch: n / (step - n) and batch


def read_rows(path):
    return list(csv.DictReader(path.open()))


def outcome(path):
    """All that a run saved but its seconds."""
    saved = cc.read_checkpoint(path)
    log = [row | {"seconds": 0} for row in saved["log"]]
    return saved["model"], saved["optimizer"], log


def write_files(folder, files):
    """{path: text, bytes or, for an image, its colour}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (44, 32), content).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---- 1. Contrastive losses, 2. context -----------------------------------------------------------
def naive_units(rows):
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def naive_clip(x, t, tau, b):
    s = tau * x @ t.T
    terms = [(s[i].exp().sum() * s[:, i].exp().sum()).log() / 2 - s[i, i] for i in range(len(s))]
    return torch.stack(terms)


def naive_siglip(x, t, tau, b):
    s = tau * x @ t.T + b
    z = 2 * torch.eye(len(s)) - 1
    return (1 + (-z * s).exp()).log().sum(1)


def naive_context(x, values, tau_ctx, mask=True):
    rows = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i or not mask]
        weights = (x[others] @ x[i] / (tau_ctx * len(x[i]) ** 0.5)).exp()
        rows.append(weights @ values[others] / weights.sum())
    return torch.stack(rows)


def naive_lixp(v, u, scalars, settings):
    loss = naive_siglip if settings.objective.startswith("sig") else naive_clip
    x, t = naive_units(v), naive_units(u)
    tau_1, tau_2, tau_ctx, b_1, b_2 = scalars
    plain = loss(x, t, tau_1, b_1).mean()
    if settings.objective in ("clip", "siglip"):
        return torch.stack([plain, plain, 0 * plain])
    values = x if settings.normalize_values else v
    values = values.detach() if settings.detach_values else values
    x_ctx = naive_units(naive_context(x, values, tau_ctx, not settings.no_mask))
    own = (tau_1, b_1) if settings.shared_temperature else (tau_2, b_2)
    context = loss(x_ctx, t, *own).mean()
    return torch.stack([settings.alpha * plain + (1 - settings.alpha) * context, plain, context])


def embeddings(B, d=16):
    """v, u (B, d) float64, not normalised, with gradients; scalars, five different numbers."""
    g = torch.Generator().manual_seed(0)
    v, u = torch.randn(2, B, d, generator=g).double()
    scalars = torch.tensor([2.7, 4.5, 0.05, -1.0, -2.0]).double()
    return v.requires_grad_(), u.requires_grad_(), scalars.requires_grad_()


def same(actual, expected, inputs):
    """Equal values, and equal gradients of a fixed random projection."""
    close(actual, expected, rtol=1e-9, atol=1e-10)
    weights = torch.linspace(1, 2, expected.numel()).sin().view(expected.shape)
    options = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    a, b = (torch.autograd.grad((y * weights).sum(), inputs, **options) for y in (actual, expected))
    close(a, b, rtol=1e-8, atol=1e-10)


SWITCHES = ["float32", "no_mask", "shared_temperature", "detach_values", "normalize_values"]


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_objectives_equal_naive_loops_with_every_switch_and_in_blocks(objective, switch):
    for B in (2, 3, 9):
        v, u, scalars = embeddings(B)
        settings = cc.Settings(objective, alpha=0.7, **{switch: True})
        expected = naive_lixp(v, u, scalars, settings)
        for settings.chunk in (0, 1, 5, 100):
            losses = cc.lixp_loss(v, u, scalars, settings)
            same(losses, expected, [v, u, scalars])


def test_losses_and_context_of_some_rows_are_those_of_the_whole_batch():
    v, u, scalars = embeddings(8)
    X, T, i = F.normalize(v), F.normalize(u), torch.tensor([7, 0])
    tau, _, tau_ctx, b, _ = scalars
    for loss, naive in ((cc.clip_loss, naive_clip), (cc.siglip_loss, naive_siglip)):
        same(loss(i, X, T, tau, b), naive(X, T, tau, b)[i], [v, u, scalars])
    for mask in (True, False):
        expected = naive_context(X, v, tau_ctx, mask)[i]
        same(cc.contextualize(i, X, v, tau_ctx, mask), expected, [v, scalars])


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_the_order_of_the_batch_does_not_matter(objective):
    v, u, scalars = embeddings(9)
    order = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])
    loss = partial(cc.lixp_loss, scalars=scalars, settings=cc.Settings(objective))
    close(loss(v[order], u[order]), loss(v, u))


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_losses_are_finite_at_the_highest_temperature_and_keep_no_matrix_in_blocks(objective):
    v, u, _ = (1e3 * e.detach().float() for e in embeddings(256))
    scalars = torch.tensor([100, 100, 0.005, -10, -10])
    inputs = [x.requires_grad_() for x in (v, v + u, scalars)]
    kept = []
    for chunk in (0, 32):
        saved = {}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = cc.lixp_loss(*inputs, cc.Settings(objective, chunk=chunk))
        gradients = torch.autograd.grad(losses[0], inputs)
        assert all(x.isfinite().all() for x in (losses, *gradients))
        kept.append(sum(x.numel() for x in saved.values()) / 256**2)
    assert kept[0] > 1 and kept[1] < 0.8, kept


PROCESS = """
import sys, torch, contextclip as cc
from torch import distributed as dist
path, *arguments = sys.argv[1:]
two = cc.WORLD_SIZE > 1
if two:
    store = dist.FileStore(path + ".store", 2)
    dist.init_process_group("gloo", store=store, rank=cc.RANK, world_size=2)
found = {}
for objective in cc.OBJECTIVES:
    for chunk in (0, 3):
        torch.manual_seed(0)
        settings = cc.Settings(objective, batch_size=16, width=16, chunk=chunk, float32=True)
        model = cc.ContextCLIP(settings, cc.build_vocabulary(["a b c d"]))
        batch = torch.rand(16, 1, 32, 32), torch.randint(2, 6, (16, 5))
        forward = torch.nn.parallel.DistributedDataParallel(model) if two else model
        losses = forward(*(part.chunk(cc.WORLD_SIZE)[cc.RANK] for part in batch))
        losses[0].backward()
        losses = losses.detach()
        if two:
            dist.all_reduce(losses)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[f"{objective} {chunk}"] = losses / cc.WORLD_SIZE, gradients
if cc.RANK == 0:
    torch.save(found, path)
if two:
    dist.barrier()
    dist.destroy_process_group()
    draw, cc.EVERY, calls = cc.Cards.draw_batch, 10, []

    def draw_batch(*given):
        calls.append(given)
        assert cc.RANK == 0 or len(calls) < 40 + 25, "one dies"
        return draw(*given)

    cc.Cards.draw_batch = draw_batch
    cc.main(arguments)
"""


def test_two_processes_compute_what_one_does_which_goes_on_when_one_dies(tmp_path, monkeypatch):
    script = write_files(tmp_path, {"process.py": PROCESS}) / "process.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    process = start_process(*torchrun, tmp_path / "2.pt", *SMALL, "--out", tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "one dies" in errors
    assert output.count("clip: cpu") == 1  # one of them speaks
    monkeypatch.setattr(sys, "argv", ["process.py", str(tmp_path / "1.pt")])
    exec(PROCESS, {})
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert len(one) == 8 and one["clip 0"][1]["image_encoder.0.weight"].abs().max() > 1e-3
    close(two, one, rtol=1e-5, atol=1e-5)
    before, half = ((tmp_path / f"{name}.pt").read_bytes() for name in ("clip", "clixp"))
    run("--out", tmp_path, "--resume")
    assert (tmp_path / "clip.pt").read_bytes() == before
    steps = [row["step"] for row in read_rows(tmp_path / "clixp.csv")]
    assert steps == ["10", "20", "40"] and half


# ---- 3. Model ------------------------------------------------------------------------------------
def test_losses_are_float32_while_the_encoder_runs_in_bf16(monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    cast = partial(torch.is_autocast_enabled, "cpu")
    monkeypatch.setattr(cc, "lixp_loss", lambda v, u, *_: (v, u.dtype, cast()))
    images, tokens = torch.rand(4, 1, 32, 32), torch.full((4, 3), 2)
    half, full = (make_model(float32=given)(images, tokens) for given in (False, True))
    assert half[1:] == full[1:] == (torch.float32, False)
    assert not torch.equal(half[0], full[0])
    close(half[0], full[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_the_cnn_takes_images_of_every_size_and_centres_them(size, monkeypatch):
    model, images = make_model(image_size=size), torch.rand(2, 1, 28, size)
    calls = spy(monkeypatch, model.image_encoder, "forward")
    assert model.encode_image(images).shape == (2, 16)
    resized = torchvision.transforms.functional.resize(images, [size, size])
    close(calls[0][0][0], 4 * resized - 2)


def test_an_embedding_depends_on_its_own_image_and_words_alone():
    model, images = make_model(), torch.rand(4, 1, 32, 32)
    close(model.encode_image(images)[:1], model.encode_image(images[:1]))
    long, short, turned = ([[2, 3, 4], [5, 2, 0]], [[5, 2]], [[2, 5]])
    a, b, c = (model.encode_text(torch.tensor(x))[-1] for x in (long, short, turned))
    close(a, b)
    assert not torch.allclose(b, c)  # the order of words counts


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_temperatures_start_as_documented_and_below_their_cap(objective):
    start = 10 if "sig" in objective else 5
    for cap, tau in ((100.0, start), (3.0, 3)):
        found = make_model(objective=objective, tau_max=cap).scalars()
        close(found, torch.tensor([tau, tau, 1 / 32, -10, -10]))


def test_captions_become_words_and_words_tokens():
    words = {"A  Dog's ball, red-blue!": "a dog s ball red-blue", "日本語 ok": "日 本 語 ok"}
    words |= {"ひら": "ひ ら", "สวัส": "ส ว ั ส", "Straße 12": "straße 12", "…": "", "Ж, é": "ж é"}
    assert {caption: " ".join(cc.split_words(caption)) for caption in words} == words
    vocabulary = cc.build_vocabulary(["b a", "b café"])
    assert vocabulary == {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3, "café": 4}
    assert list(cc.build_vocabulary(["b a", "b b"], min_count=3)) == ["<pad>", "<unk>", "b"]
    tokens = cc.tokenize(["A zzz B", "", "café"], vocabulary)
    exact(tokens, torch.tensor([[2, 1, 3], [1, 0, 0], [4, 0, 0]]))
    assert cc.tokenize(["a " * 99], vocabulary).shape == (1, 32)
    assert cc.tokenize("a b", vocabulary).tolist() == [[2, 3]]  # one caption, not three


@pytest.mark.parametrize("changes", [{}, {"number_share": 0.0}, {"data": "x"}])
def test_the_text_of_a_class_is_the_mean_of_its_captions_and_of_ten_numbers(cards, changes):
    model = make_model(cards, **changes)
    endings = [""] if changes else [f" number {n} {n} {n}" for n in cc.NUMERALS]
    classes, means = [["digit one", "one"], ["greek", "alpha letter"]], []
    for captions in classes:
        texts = [text + ending for text in captions for ending in endings]
        embedded = [model.encode_text(cc.tokenize(text, cards.vocabulary))[0] for text in texts]
        means.append(naive_units(embedded).mean(0))
    close(cc.embed_classes(model, classes), naive_units(means))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_encoders_of_torchvision_train_and_ask_for_weights_once(cards, tmp_path, monkeypatch, name):
    asked, get = [], cc.models.get_model
    monkeypatch.setattr(cc.models, "get_model", lambda n, weights: asked.append(weights) or get(n))
    monkeypatch.setattr(cc.Cards, "validate", lambda *_: {})
    settings = {"steps": 2, "batch_size": 4, "encoder": name, "pretrained": True}
    first = train(cards, tmp_path, "clip", lr=0.0, **settings)["model"]
    last = train(cards, tmp_path, **settings)["model"]
    model = cc.load(tmp_path / "clixp.pt")
    changed = [not torch.equal(first[key], last[key]) for key, _ in model.named_parameters()]
    assert asked == ["DEFAULT", "DEFAULT", None] and np.mean(changed) > 0.9
    assert model.encode_image(torch.rand(3, 1, 50, 50)).shape == (3, 16)


# ---- 4. Training ---------------------------------------------------------------------------------
def test_a_step_follows_from_seed_step_and_process_alone(cards, tmp_path, monkeypatch):
    def draw(step, rank=0, **changes):
        with monkeypatch.context() as patch, interrupted():
            patch.setattr(cc, "RANK", rank)
            patch.setattr(cc, "lixp_loss", lambda *_: torch.ones(3, requires_grad=True))
            drawn = spy(patch, cc, "draw_cards")
            change_batches(patch, cc.Cards, stop_at(step))
            torch.rand(1)
            train(cards, tmp_path / f"{step} {rank} {changes}", **changes)
        return drawn[-1][1]

    exact(draw(2), draw(2, objective="siglip", steps=30))
    others = [draw(1), draw(2), draw(1, rank=1), draw(1, seed=1)]
    assert len(torch.stack(others).unique(dim=0)) == 4


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_a_run_lowers_the_loss_and_tells_how_it_goes(objective, cards, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    batch = cards.draw_batch(cc.Settings(batch_size=16))
    change_batches(monkeypatch, cc.Cards, lambda *_: batch)
    calls = spy(monkeypatch, cc, "lixp_loss")
    saved = train(cards, tmp_path, objective, steps=50, lr=5e-3)
    losses = torch.stack([found.detach() for _, found in calls])
    means = torch.stack([part.mean(0) for part in losses.split(20)])

    rows = read_rows(tmp_path / f"{objective}.csv")
    assert [row["step"] for row in rows] == ["20", "40", "50"]
    found = np.array([[*row.values()] for row in rows], float)
    close(torch.tensor(found)[:, 2:5].float(), means)
    assert (losses[-1] < 0.5 * losses[0]).tolist() == [True, True, False] or losses[-1, 2] > 0
    assert losses[-1, 2] < losses[0, 2] or objective in ("clip", "siglip")
    model = cc.load(tmp_path / f"{objective}.pt")
    assert found[-1, 5:10].tolist() == model.scalars().tolist()
    assert [str(value) for value in cards.validate(model).values()] == [*rows[-1].values()][10:]

    first, *lines = capsys.readouterr().out.splitlines()
    chance = 3.77 if "sig" in objective else 2.77
    assert first.startswith(f"{objective}: cpu, ") and first.endswith(f"at chance {chance}")
    for line, row, mean in zip(lines, rows, means, strict=True):
        assert line.startswith(f"{objective}  step {row['step']}  ")
        assert f"loss {mean[0]:.3f}  zero-shot {float(row['zero-shot']):.1f}  1-shot" in line
    rate = saved["optimizer"]["param_groups"][0]["lr"]
    assert rate == cc.learning_rate(50, cc.Settings(steps=50, lr=5e-3))


def test_weight_decay_spares_gains_and_the_learning_rate_has_a_warm_up(cards, tmp_path):
    groups = train(cards, tmp_path, steps=1, weight_decay=0.3)["optimizer"]["param_groups"]
    matrices = [p.ndim >= 2 for p in cc.load(tmp_path / "clixp.pt").parameters()]
    found = [(group["weight_decay"], len(group["params"])) for group in groups]
    assert found == [(0.3, matrices.count(True)), (0.0, matrices.count(False))]
    found = [cc.learning_rate(n, cc.Settings(steps=100, lr=0.5)) for n in (1, 4, 5, 6, 51, 100)]
    cosine = [0.25 * (1 + math.cos(math.pi * x)) for x in (0.04, 0.05, 0.5, 0.99)]
    assert found == pytest.approx([0.1, 0.4, *cosine])


def test_alpha_one_is_the_base_run_bit_for_bit(cards, tmp_path):
    a = train(cards, tmp_path, "clip")["model"]
    b = train(cards, tmp_path, "clixp", alpha=1.0)["model"]
    exact(a, b)  # so both have seen the same batches, too
    assert a["log_tau"][0] != a["log_tau"][1] == make_model().log_tau[1]


RUNS = [("cards", "cnn", 10), ("photos", "cnn", 10), ("cards", "mobilenet_v3_small", 2)]


@pytest.mark.parametrize("name, encoder, n", RUNS)  # mobilenet has batch norm and dropout
def test_an_interrupted_and_resumed_run_is_the_whole_one(
    name, encoder, n, request, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cc, "EVERY", n)
    monkeypatch.setattr(cc.Cards, "validate", lambda *_: {})
    data, whole, parts = request.getfixturevalue(name), tmp_path / "a", tmp_path / "b"
    go = partial(train, data, data=name, encoder=encoder, steps=4 * n, batch_size=8)
    go(whole)
    with monkeypatch.context() as patch, interrupted():
        change_batches(patch, type(data), stop_at(3 * n))
        go(parts)
    cc.load(parts / "clixp.pt")
    seconds = [row["seconds"] for row in go(parts)["log"]]
    cc.load(parts / "clixp.pt")
    exact(outcome(whole / "clixp.pt"), outcome(parts / "clixp.pt"))
    assert len(seconds) == 5 and seconds == sorted(seconds)
    notes = re.findall(r"b.clixp.pt is not finished, step \d+", capsys.readouterr().out)
    assert [note.split()[-1] for note in notes] == [f"{2 * n}"]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_a_killed_process_is_resumed_exactly_and_a_finished_run_only_reported(tmp_path, capsys):
    options = ["--objective", "clixp", "--steps", 120, "--resume", "--out"]
    whole, parts = (tmp_path / name / "clixp.pt" for name in ("whole", "parts"))
    code = "import contextclip as cc; cc.EVERY = 20; cc.main()"
    process = start_process("-c", code, *SMALL, *options, parts.parent)
    while not parts.with_suffix(".csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert 20 <= cc.read_checkpoint(parts)["log"][-1]["step"] < 120
    run(*options, whole.parent)
    run(*options, parts.parent)
    exact(outcome(whole), outcome(parts))
    before = whole.read_bytes(), whole.stat().st_mtime_ns
    capsys.readouterr()
    run(*options, whole.parent)
    assert (whole.read_bytes(), whole.stat().st_mtime_ns) == before
    assert "clixp: cpu" in capsys.readouterr().out


def test_a_run_with_other_settings_or_captions_is_not_resumed(cards, tmp_path, monkeypatch):
    go = partial(train, cards, tmp_path)
    go(lr=1.0, steps=1)
    for changes in ({"lr": 0.5}, {"lr": 1.0, "seed": 1}, {"lr": 1.0, "no_mask": True}):
        *_, name = changes
        old = {"lr": 1.0}.get(name, getattr(cc.Settings(), name))
        with user_error(match=rf"clixp.pt was made with {{'{name}': {old}}}"):
            go(steps=1, **changes)
    monkeypatch.setattr(cards, "vocabulary", cards.vocabulary | {"new": 220})
    with user_error(match="was made with other captions"):
        go(lr=1.0, steps=1)


def test_a_run_is_there_from_step_0_and_never_overwritten(tmp_path, monkeypatch, capsys):
    out = tmp_path / "it's"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(cc.Cards, "draw_batch", pytest.MonkeyPatch.undo)
        patch.setattr(cc.F, "normalize", None)
        patch.setattr(cc, "learning_rate", None)
        raise SystemExit(130)
    assert exit.value.code == 130
