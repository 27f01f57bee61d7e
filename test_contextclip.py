"""Tests of contextclip.py and fewshot.py: `python -m pytest`. Offline, on the CPU, a minute."""

import copy
import csv
import math
import os
import re
import shlex
import shutil
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
from pytest import approx
from torch import cat, equal, eye, full, rand, stack, tensor

import contextclip as cc
import fewshot as fs
from contextclip import (
    FACE_SPLITS,
    Cards,
    Photos,
    Settings,
    load,
    read_captions,
    read_checkpoint,
    split_words,
    tokenize,
)

HERE = Path(__file__).parent
SMALL = "--steps 40 --batch-size 16 --width 16 --float32 --cpu".split()
SETTINGS = {"steps": 40, "batch_size": 16, "width": 16, "float32": True}
close = torch.testing.assert_close
exact = partial(close, rtol=0, atol=0)
each = pytest.mark.parametrize
objectives = each("objective", cc.OBJECTIVES)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cards():
    """The typefaces are drawn once for all tests, in which every twentieth step is logged."""
    drawn = cc.draw_typefaces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cc, "draw_typefaces", lambda: drawn)
        patch.setattr(cc, "EVERY", 20)
        yield Cards("cpu")


def user_error(match):
    return pytest.raises(cc.UserError, match=match)


@pytest.fixture
def printed(capsys):
    """printed(): what was printed since it was last asked."""
    return lambda: capsys.readouterr().out


@pytest.fixture
def patch(monkeypatch):
    return monkeypatch.setattr


def make_model(words=None, **changes):
    """A new model, with the words of Cards or Photos."""
    torch.manual_seed(0)
    vocabulary = words.vocabulary if words else cc.build_vocabulary(["a b c d"])
    model = cc.ContextCLIP(Settings(**SETTINGS | changes), vocabulary)
    return model.eval().requires_grad_(False)


def train(source, out, objective="clixp", **changes):
    """A small run -> what it saved."""
    out.mkdir(parents=True, exist_ok=True)
    cc.train(Settings(objective, **SETTINGS | changes), source, out)
    return read_checkpoint(out / f"{objective}.pt")


def run(*arguments, program=cc):
    """The command line, in this process."""
    small = SMALL if program is cc else ["--cpu"]
    program.main([*small, *map(str, arguments)])


def refuse(capsys, *arguments, program=cc):
    """The one line with which the command ends, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(*arguments, program=program)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def start_process(*command, **options):
    """python COMMAND in a process of its own, which finds contextclip."""
    options["env"] = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    options["stdout"] = options["stderr"] = subprocess.PIPE
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, **options)


@pytest.fixture
def spy(patch):
    """spy(owner, name): a list of (arguments, result) of all calls of owner.name from now on."""

    def spy(owner, name):
        calls, function = [], getattr(owner, name)

        def watched(*given):
            calls.append((given, function(*given)))
            return calls[-1][1]

        patch(owner, name, watched)
        return calls

    return spy


@pytest.fixture
def change_batches(spy, patch):
    """change_batches(change): from now on the n-th batch is change(n, images, tokens)."""

    def change_batches(change, data=Cards):
        calls = spy(data, "draw_batch")
        draw = data.draw_batch
        patch(data, "draw_batch", lambda *given: change(len(calls) + 1, *draw(*given)))

    return change_batches


def stop_at(step, error=ZeroDivisionError):
    def change(n, *batch):
        if n == step:
            raise error
        return batch

    return change


def read_rows(path):
    return list(csv.DictReader(path.open()))


def outcome(path):
    """All that a run saved but its seconds."""
    saved = read_checkpoint(path)
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
    return stack([row / row.square().sum().sqrt() for row in rows])


def naive_clip(x, t, tau, b):
    s = tau * x @ t.T
    return (s.exp().sum(1).log() + s.exp().sum(0).log()) / 2 - s.diagonal()


def naive_siglip(x, t, tau, b):
    s = tau * x @ t.T + b
    z = 2 * eye(len(s)) - 1
    return (1 + (-z * s).exp()).log().sum(1)


def naive_context(x, values, tau_ctx, mask):
    weights = (x @ x.T / (tau_ctx * x.shape[1] ** 0.5)).exp() * (1 - mask * eye(len(x)))
    return weights @ values / weights.sum(1, True)


def naive_lixp(v, u, scalars, settings):
    loss = naive_siglip if "sig" in settings.objective else naive_clip
    tau_1, tau_2, tau_ctx, b_1, b_2 = scalars
    if settings.shared_temperature:
        tau_2, b_2 = tau_1, b_1
    x, t = naive_units(v), naive_units(u)
    values = x if settings.normalize_values else v
    values = values.detach() if settings.detach_values else values
    x_ctx = naive_units(naive_context(x, values, tau_ctx, not settings.no_mask))
    alpha, context = 1, 0 * u[0, 0]
    if "xp" in settings.objective:
        alpha, context = settings.alpha, loss(x_ctx, t, tau_2, b_2).mean()
    plain = loss(x, t, tau_1, b_1).mean()
    return stack([alpha * plain + (1 - alpha) * context, plain, context])


def embeddings(B):
    """v, u (B, 16) float64, not normalised, with gradients; scalars, five different numbers."""
    v, u = torch.randn(2, B, 16).double()
    scalars = tensor([2.7, 4.5, 0.05, -1.0, -2.0]).double()
    return v.requires_grad_(), u.requires_grad_(), scalars.requires_grad_()


def same(actual, expected, inputs):
    """Equal values, and equal gradients of a fixed random projection."""
    close(actual, expected, rtol=1e-9, atol=1e-10)
    weights = torch.linspace(1, 2, expected.numel()).sin().view(expected.shape)
    options = {"retain_graph": True, "materialize_grads": True}
    a, b = (torch.autograd.grad((y * weights).sum(), inputs, **options) for y in (actual, expected))
    close(a, b, rtol=1e-8, atol=1e-10)


SWITCHES = ["float32", "no_mask", "shared_temperature", "detach_values", "normalize_values"]


@each("switch", SWITCHES)
@objectives
def test_objectives_equal_their_formulas_with_every_switch_in_blocks_in_any_order(
    objective, switch
):
    for B in (2, 3, 9):
        v, u, scalars = embeddings(B)
        settings = Settings(objective, alpha=0.7, **{switch: True})
        expected = naive_lixp(v, u, scalars, settings)
        close(cc.lixp_loss(v.flip(0), u.flip(0), scalars, settings), expected)
        for settings.chunk in (0, 1, 5, 100):
            losses = cc.lixp_loss(v, u, scalars, settings)
            same(losses, expected, [v, u, scalars])


@objectives
def test_losses_are_finite_at_the_highest_temperature_and_keep_no_matrix_in_blocks(objective):
    v, u, _ = (1e3 * e.detach().float() for e in embeddings(256))
    inputs = [x.requires_grad_() for x in (v, v + u, tensor([100, 100, 0.005, -10, -10]))]
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    def size_kept(chunk):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = cc.lixp_loss(*inputs, Settings(objective, chunk=chunk))
        gradients = torch.autograd.grad(losses[0], inputs)
        assert all(x.isfinite().all() for x in (losses, *gradients))
        return sum(x.numel() for x in saved.values()) / 256**2

    assert size_kept(chunk=32) < 0.8 < 1 < size_kept(chunk=0)


PROCESS = """
import sys, torch, contextclip as cc
from torch import distributed as dist
path, *arguments = sys.argv[1:]
rank = cc.RANK
store = dist.FileStore(path, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

def compute(objective, chunk, processes):
    cc.RANK, cc.WORLD_SIZE = (rank, 2) if processes == 2 else (0, 1)
    torch.manual_seed(0)
    settings = cc.Settings(objective, batch_size=16, width=16, chunk=chunk, float32=True)
    model = cc.ContextCLIP(settings, cc.build_vocabulary(["a b c d"]))
    batch = torch.rand(16, 1, 32, 32), torch.randint(2, 6, (16, 5))
    forward = torch.nn.parallel.DistributedDataParallel(model) if processes == 2 else model
    losses = forward(*(part.chunk(processes)[cc.RANK] for part in batch))
    losses[0].backward()
    losses = losses.detach() / processes
    if processes == 2:
        dist.all_reduce(losses)
    return losses, [p.grad for p in model.parameters()]

for objective in cc.OBJECTIVES:
    for chunk in (0, 3):
        one, two = (compute(objective, chunk, processes) for processes in (1, 2))
        assert one[1][0].abs().max() > 1e-4
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)

dist.barrier()
dist.destroy_process_group()
draw, cc.EVERY, calls = cc.Cards.draw_batch, 10, []

def draw_batch(*given):
    calls.append(given)
    assert cc.RANK == 0 or len(calls) < 40 + 25, "one dies"
    return draw(*given)

validate_and_save = cc.validate_and_save

def compare(row, losses, model, *given):
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.zeros_like(weights), torch.zeros_like(weights)]
    dist.all_gather(both, weights)
    torch.testing.assert_close(*both, rtol=0, atol=0)
    validate_and_save(row, losses, model, *given)

cc.Cards.draw_batch, cc.validate_and_save = draw_batch, compare
cc.main(arguments)
"""


def test_two_processes_compute_what_one_does_which_goes_on_when_one_dies(tmp_path):
    script = write_files(tmp_path, {"process.py": PROCESS}) / "process.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    process = start_process(*torchrun, tmp_path / "store", *SMALL, "--out", tmp_path)
    output, errors = process.communicate(timeout=120)
    assert "AssertionError: one dies" in errors, errors
    assert output.count("clip: cpu") == 1  # one of them speaks
    before = (tmp_path / "clip.pt").read_bytes()
    assert read_checkpoint(tmp_path / "clixp.pt")["log"][-1]["step"] == 20
    run("--out", tmp_path, "--resume")
    assert (tmp_path / "clip.pt").read_bytes() == before
    assert [row["step"] for row in read_rows(tmp_path / "clixp.csv")] == ["10", "20", "40"]


# ---- 3. Model ------------------------------------------------------------------------------------
def test_losses_are_float32_while_the_encoder_runs_in_bf16(patch):
    patch(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    patch(cc, "lixp_loss", lambda v, *_: (v, v.dtype, torch.is_autocast_enabled("cpu")))
    batch = rand(4, 1, 32, 32), full((4, 3), 2)
    half, whole = (make_model(float32=given)(*batch) for given in (False, True))
    assert half[1:] == whole[1:] == (torch.float32, False)
    assert 1e-6 < (half[0] - whole[0]).abs().max() < 0.1


@each("size", [8, 33, 64])
def test_the_cnn_takes_images_of_every_size_and_centres_them(size, spy):
    model, images = make_model(image_size=size), rand(2, 1, 28, size)
    calls = spy(model.image_encoder, "forward")
    assert model.encode_image(images).shape == (2, 16)
    resized = torchvision.transforms.functional.resize(images, [size, size])
    close(calls[0][0][0], 4 * resized - 2)


def test_a_text_depends_on_its_words_and_their_order_but_not_on_padding():
    a, b, c = ([[2, 3, 4], [5, 2, 0]], [[5, 2]], [[2, 5]])
    a, b, c = (make_model().encode_text(tensor(x))[-1] for x in (a, b, c))
    close(a, b)
    assert not torch.allclose(b, c)


@objectives
def test_temperatures_start_as_documented_and_below_their_cap(objective):
    start = 10 if "sig" in objective else 5
    for cap, tau in ((100.0, start), (3.0, 3)):
        found = make_model(objective=objective, tau_max=cap).scalars()
        close(found, tensor([tau, tau, 1 / 32, -10, -10]))


def test_captions_become_words_and_words_tokens():
    caption = "A  Dog's ball, red-blue! 日本語 ok ひら สวัส Straße 12 … Ж, é"
    words = "a dog s ball red-blue 日 本 語 ok ひ ら ส ว ั ส straße 12 ж é"
    assert " ".join(split_words(caption)) == words
    vocabulary = cc.build_vocabulary(["b a", "b café"])
    assert vocabulary == {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3, "café": 4}
    tokens = tokenize(["A zzz B", "", "café"], vocabulary)
    exact(tokens, tensor([[2, 1, 3], [1, 0, 0], [4, 0, 0]]))
    assert tokenize(["a " * 99], vocabulary).shape == (1, 32)
    exact(tokenize("a b", vocabulary), tensor([[2, 3]]))  # one caption, not three


@each("changes", [{}, {"number_share": 0.0}, {"data": "x"}])
def test_the_text_of_a_class_is_the_mean_of_its_captions_and_of_ten_numbers(cards, changes):
    model, means = make_model(cards, **changes), []
    endings = [""] if changes else [f" number {n} {n} {n}" for n in cc.NUMERALS]
    classes = [["digit one", "one"], ["greek", "alpha letter"]]
    for captions in classes:
        tokens = [tokenize(c + end, cards.vocabulary) for c in captions for end in endings]
        means.append(naive_units([model.encode_text(row)[0] for row in tokens]).mean(0))
    close(cc.embed_classes(model, classes), naive_units(means))


@each("name", ["resnet18", "mobilenet_v3_small"])
def test_encoders_of_torchvision_ask_for_weights_once_and_are_compiled_when_asked(
    cards, tmp_path, patch, name
):
    asked, compiled, get = [], [], cc.models.get_model
    patch(torch.nn.Module, "compile", lambda self: compiled.append(self))
    patch(cc.models, "get_model", lambda name, weights: asked.append(weights) or get(name))
    patch(Cards, "validate", lambda *_: {})
    given = {"encoder": name, "pretrained": True, "compile": name == "resnet18"}
    train(cards, tmp_path, steps=2, batch_size=4, **given)
    assert len(compiled) == given["compile"]
    model = load(tmp_path / "clixp.pt")
    assert asked == ["DEFAULT", None] and not model.training


# ---- 4. Training ---------------------------------------------------------------------------------
def test_a_step_follows_from_seed_step_and_process_alone(
    cards, tmp_path, patch, spy, change_batches
):
    drawn = spy(cc, "draw_cards")
    patch(cc, "lixp_loss", lambda *_: torch.ones(3, requires_grad=True))

    def draw(step, rank=0, **changes):
        change_batches(stop_at(step))
        patch(cc, "RANK", rank)
        rand(1)
        with pytest.raises(ZeroDivisionError):
            train(cards, tmp_path / f"{step} {rank} {changes}", **changes)
        return drawn[-1][0][1]  # the characters

    exact(draw(2), draw(2, objective="siglip", steps=30))
    others = [draw(1), draw(2), draw(1, rank=1), draw(1, seed=1)]
    assert len(stack(others).unique(dim=0)) == 4


@objectives
def test_a_run_lowers_the_loss_and_tells_how_it_goes(
    objective, cards, tmp_path, spy, change_batches, printed
):
    batch = cards.draw_batch(Settings(batch_size=16))
    change_batches(lambda *_: batch)
    calls = spy(cc, "lixp_loss")
    train(cards, tmp_path, objective, steps=50, lr=5e-3)
    losses = stack([found.detach() for _, found in calls])
    assert losses[-1, 0] < 0.5 * losses[0, 0]
    assert (losses[-1, 2] < losses[0, 2]) == objective.endswith("xp")

    rows = read_rows(tmp_path / f"{objective}.csv")
    assert [row["step"] for row in rows] == ["20", "40", "50"]
    found = tensor([[float(value) for value in row.values()] for row in rows])
    close(found[:, 2:5], stack([part.mean(0) for part in losses.split(20)]))
    model = load(tmp_path / f"{objective}.pt")
    last = [*model.scalars(), *cards.validate(model).values()]
    close(found[-1, 5:], tensor(last))

    first = printed().splitlines()[0]
    chance = 3.77 if "sig" in objective else 2.77
    assert first.startswith(f"{objective}: cpu, ") and first.endswith(f"at chance {chance}")


def test_weight_decay_spares_gains_and_the_learning_rate_has_a_warm_up(cards, tmp_path):
    groups = train(cards, tmp_path, steps=2, weight_decay=0.3)["optimizer"]["param_groups"]
    matrices = [p.ndim >= 2 for p in load(tmp_path / "clixp.pt").parameters()]
    found = [(group["weight_decay"], len(group["params"])) for group in groups]
    assert found == [(0.3, matrices.count(True)), (0.0, matrices.count(False))]
    assert groups[1]["lr"] == approx(1e-3)
    rates = [cc.learning_rate(n, Settings(steps=100, lr=4.0)) for n in (1, 5, 51)]
    assert rates == approx([0.8, 2 + 2 * math.cos(0.04 * math.pi), 2])


def test_alpha_one_is_the_base_run_bit_for_bit(cards, tmp_path):
    a = train(cards, tmp_path, "clip")["model"]
    b = train(cards, tmp_path, "clixp", alpha=1.0)["model"]
    exact(a, b)  # so both have seen the same batches, too
    assert a["log_tau"][0] != a["log_tau"][1] == make_model().log_tau[1]


RUNS = [("cards", "cnn", 10), ("photos", "cnn", 10), ("cards", "mobilenet_v3_small", 2)]


@each("name, encoder, n", RUNS)  # mobilenet has batch norm and dropout
def test_an_interrupted_and_resumed_run_is_the_whole_one(
    name, encoder, n, request, tmp_path, patch, change_batches, printed
):
    patch(cc, "EVERY", n)
    patch(Cards, "validate", lambda *_: {})
    data, whole, parts = request.getfixturevalue(name), tmp_path / "a", tmp_path / "b"
    go = partial(train, data, data=name, encoder=encoder, steps=4 * n, batch_size=8)
    go(whole)
    change_batches(stop_at(3 * n), type(data))
    with pytest.raises(ZeroDivisionError):
        go(parts)
    load(parts / "clixp.pt")
    seconds = [row["seconds"] for row in go(parts)["log"]]
    assert seconds == sorted(seconds)
    load(parts / "clixp.pt")
    exact(outcome(whole / "clixp.pt"), outcome(parts / "clixp.pt"))
    assert printed().count("b/clixp.pt is not finished") == 1  # before, not after


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_a_killed_process_is_resumed_exactly_and_a_finished_run_only_reported(tmp_path, printed):
    options = ["--objective", "clixp", "--steps", 120, "--resume", "--out"]
    whole, parts = (tmp_path / name / "clixp.pt" for name in "ab")
    code = "import contextclip as cc; cc.EVERY = 20; cc.main()"
    process = start_process("-c", code, *SMALL, *options, parts.parent)
    while not parts.with_suffix(".csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 20 <= read_checkpoint(parts)["log"][-1]["step"] < 120
    run(*options, whole.parent)
    run(*options, parts.parent)
    exact(outcome(whole), outcome(parts))
    before = whole.stat().st_mtime_ns
    printed()
    run(*options, whole.parent)
    assert whole.stat().st_mtime_ns == before and printed().startswith("clixp: cpu")


def test_a_run_with_other_settings_or_captions_is_not_resumed(cards, tmp_path, patch):
    go = partial(train, cards, tmp_path, steps=1)
    go()
    for name, old, new in (("lr", 0.002, 0.5), ("no_mask", False, True), ("steps", 1, 2)):
        with user_error(rf"clixp.pt was made with {{'{name}': {old}}}"):
            go(**{name: new})
    patch(cards, "vocabulary", cards.vocabulary | {"new": 220})
    with user_error("was made with other captions"):
        go()


def test_a_run_is_there_from_step_0_and_never_overwritten(tmp_path, change_batches, capsys):
    path = tmp_path / "it's" / "clixp.pt"
    change_batches(stop_at(1, KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        run("--objective", "clixp", "--out", path.parent)
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert read_checkpoint(path)["log"] == [{"step": 0, "seconds": 0.0}]
    before = path.read_bytes()
    line = refuse(capsys, "--out", path.parent)
    assert f"{path} is there: --resume goes on with it, or take another --out" in line
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before
    run("--out", path.parent, "--resume")
    names = " ".join(sorted(path.name for path in path.parent.iterdir()))
    assert names == "clip.csv clip.pt clixp.csv clixp.pt"  # no lock, nothing temporary
    assert capsys.readouterr()[0].endswith("next: python fewshot.py, with the same --out\n")


def test_a_failed_save_keeps_the_old_checkpoint(cards, tmp_path, patch):
    def write_bytes(path, content):
        path.open("wb").write(content[:100])
        raise OSError(28, "No space left on device")

    path = tmp_path / "clip.pt"
    state = cc.start(Settings(), cards, path)
    before = path.read_bytes()
    patch(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        cc.save(path, *state)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_is_not_saved(cards, tmp_path, change_batches):
    with user_error("not finite at step 1, .*clip.pt is as it was"):
        train(cards, tmp_path, "clip", steps=1, lr=1e38)  # the weights
    assert len(read_checkpoint(tmp_path / "clip.pt")["log"]) == 1
    change_batches(lambda n, images, tokens: (images / (n != 37), tokens))
    with user_error("not finite at step 40, .*clixp.pt is as it was"):
        train(cards, tmp_path)
    assert read_checkpoint(tmp_path / "clixp.pt")["log"][-1]["step"] == 20


def test_post_training_starts_from_the_weights_of_the_base(cards, tmp_path):
    base, path = train(cards, tmp_path, "siglip"), tmp_path / "siglip.pt"

    def go(out):
        given = {"init": str(path), "lr": 0.0, "steps": 1}
        return train(cards, tmp_path / out, "siglixp", **given)["model"]

    a, b = base["model"], go("1")
    for name in ("log_tau", "b"):  # the base has not learned those of the context loss
        assert b[name][1] == b[name][0] == a[name][0] != a[name][1]
        b[name] = a[name]
    exact(a, b)
    base["settings"] = asdict(base["settings"]) | {"objective": "siglixp"}  # this one has
    a["log_tau"][:2] = tensor([9, -1])
    torch.save(base, path)
    close(go("2")["log_tau"][:2], tensor([100, 1]).log())  # and they stay in their range


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_never_waits_for_the_gpu(tmp_path, change_batches):
    def watch(n, *batch):  # from the second step to the last but one: at the last it logs
        torch.cuda.set_sync_debug_mode("error" if 1 < n % 20 < 19 else "default")
        return batch

    data = Cards(cc.choose_device(cpu=False))
    change_batches(watch)
    for objective in cc.OBJECTIVES:
        train(data, tmp_path, objective, steps=20, float32=False)


# ---- 5. Cards ------------------------------------------------------------------------------------
def test_splits_are_disjoint_and_validation_has_trained_words_alone(cards):
    assert [part.start for part in FACE_SPLITS.values()] == [0, 10, 12]
    assert ["STIX" in face for face in cc.FACES] == 12 * [False] + 4 * [True]
    splits = {}
    for name, split in zip(cards.names, cards.splits, strict=True):
        letter = re.sub("capital|small", "", name) if " with " in name else name
        assert splits.setdefault(letter, split) == split  # a capital with its small letter
    known, others = cards.validation[0], sum(cards.validation[1:], [])
    assert (len(cards.train), len(known), len({*others} - {*known})) == (669, 76, 120)
    parts = [{cards.splits[i] for i in rows} for rows in (cards.train, known + others)]
    assert parts == [{"train"}, {"validation"}]
    trained, new = (" ".join(cards.names[i] for i in rows) for rows in (cards.train, known))
    assert {*split_words(new)} <= {*split_words(trained)}


def bounding_box(image):
    return np.array(image.crop(image.getbbox())).astype(int)


NAMED = {"A": "latin capital letter a", "→": "rightwards arrow"}


@each("case", "A 0|A 13|→ 8|471 0|037 8|471 13".split("|"))
def test_bitmaps_show_the_character_named_and_the_number(cards, case):
    text, face = case.split()
    if text in NAMED:
        size, bitmaps = 22, cards.glyphs[cards.names.index(NAMED[text])]
    else:
        size, bitmaps = 12, cards.plates[int(text)]
    path = f"{cc.get_data_path()}/fonts/ttf/{cc.FACES[int(face)]}.ttf"
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new("L", (90, 90))
    ImageDraw.Draw(canvas).text((30, 30), text, 255, font)
    a, b = bounding_box(canvas), bounding_box(Image.fromarray(bitmaps[int(face)].numpy()))
    assert a.shape == b.shape and np.abs(a - b).mean() < 2


def test_a_card_shows_its_character_in_many_shades(cards, patch):
    for name in ("lay_plates", "warp"):
        patch(cc, name, lambda images, *_: images)
    rows = cards.train
    images = cc.draw_cards(cards, rows, rows, "train").flatten(1)
    glyphs = cards.glyphs[rows, FACE_SPLITS["train"]].float().flatten(2)
    x, g = (F.normalize(e - e.mean(-1, True), dim=-1) for e in (images, glyphs))
    similar = torch.einsum("bp,cfp->bcf", x, g)
    best = similar.abs().amax(2).argmax(1)
    assert (best == torch.arange(len(rows))).float().mean() > 0.9  # some look alike
    inverted = similar.amax((1, 2)) < -similar.amin((1, 2))
    assert 0.4 < inverted.float().mean() < 0.6
    low, high = images.aminmax(dim=1)
    contrast = high - low  # none is empty, though some typefaces lack some characters
    assert -0.03 < low.min() < 0.2 < contrast.min() < 0.45 and 0.85 < contrast.max() < 1.05


@each("split", FACE_SPLITS)
def test_plates_carry_the_number_and_lie_near_the_top_or_bottom(cards, split):
    images, numbers = full((100, 1, 32, 32), 0.5), torch.randperm(1000)[:100]
    zero = torch.zeros(100, 1, 1)
    cc.lay_plates(images, cards, numbers, split, zero, zero + 1)
    windows = images[:, 0].unfold(1, 9, 1).unfold(2, 24, 1).flatten(3)  # (100, 24, 9, 9 * 24)
    plates = cards.plates[numbers, FACE_SPLITS[split]].flatten(2) / 255  # (100, faces, 216)
    equal = (windows[:, :, :, None] == plates[:, None, None]).all(4).nonzero().T
    row, top, left, face = (index.unique().tolist() for index in equal)
    assert len(row) == 100 and len(face) == plates.shape[1]  # all typefaces
    assert top == [0, 1, 2, 3, 20, 21, 22, 23] and left == list(range(9))


def test_glyphs_are_turned_sheared_scaled_and_moved(spy):
    calls = spy(cc, "uniform")
    images = rand(64, 1, 32, 32)
    warped = cc.warp(images)
    ranges = " ".join(f"{low:.2f} {high:.2f}" for (_, low, high), _ in calls)
    assert ranges == "-0.15 0.15 -0.20 0.20 0.80 1.60 -0.31 0.31 -0.31 0.31"
    angle, shear, scale, right, down = (drawn.flatten() for _, drawn in calls)
    c, s = angle.cos(), angle.sin()
    rows = stack((c, shear - s, right, s, c, down), 1) / scale[:, None]
    grid = F.affine_grid(rows.view(-1, 2, 3), images.shape, align_corners=False)
    close(warped, F.grid_sample(images, grid, align_corners=False), rtol=0, atol=1e-4)


@each("split", FACE_SPLITS)
def test_cards_use_every_typeface_of_their_split_and_no_other(cards, split, patch):
    for name in ("lay_plates", "warp"):
        patch(cc, name, lambda images, *_: images)
    data, rows = copy.copy(cards), full((400,), cards.characters.index("e"))
    data.glyphs = 0 * cards.glyphs
    for face in range(16):
        data.glyphs[:, face, face] = 255  # each has a row of its own
    rows = cc.draw_cards(data, rows, rows, split)[:, 0].mean(2)
    used = (rows - rows[:, 16:].mean(1, True)).abs().argmax(1).bincount(minlength=16) / 400
    own = range(16)[FACE_SPLITS[split]]
    assert used.tolist() == approx([(face in own) / len(own) for face in range(16)], abs=0.08)
    assert used.count_nonzero() == len(own)


@each("share", [0.0, 0.5, 1.0])
def test_captions_name_the_character_and_the_number_drawn(cards, share, spy):
    calls, laid = spy(cc, "draw_cards"), spy(cc, "lay_plates")
    _, tokens = cards.draw_batch(Settings(batch_size=800, number_share=share))
    _, rows, numbers, split = calls[0][0]
    assert laid[0][0][2] is numbers and split == "train"
    assert len(rows.unique()) > 400
    named = 0
    for row, i, number in zip(tokens, rows, numbers, strict=True):
        name = cards.names[i]
        bare, both = tokenize([name, f"{name} {cc.spell(number)}"], cards.vocabulary)
        row = row[: len(both)]
        assert equal(row, bare) or equal(row, both)
        named += equal(row, both)
    assert named / 800 == approx(share, abs=0.06)
    assert cc.spell(471) == "number four seven one"


@each("processes, B, most", [(1, 512, 1), (2, 1000, 1), (2, 1200, 2)])
def test_no_number_comes_twice_in_a_batch(cards, patch, spy, processes, B, most):
    calls = spy(cc, "draw_cards")
    patch(cc, "WORLD_SIZE", processes)
    for rank in range(processes):
        patch(cc, "RANK", rank)
        cards.draw_batch(Settings(batch_size=B))
    numbers = cat([given[2] for given, _ in calls])
    counts = numbers.bincount()
    assert counts.sum() == B and counts.max() == most


def test_validation_equals_a_plain_loop_and_its_supports_are_nested(cards, spy):
    data, model = copy.copy(cards), make_model(cards)
    data.validation = [rows[:4] for rows in cards.validation[:2]]
    calls, laid = spy(cc, "draw_cards"), spy(cc, "lay_plates")
    found = data.validate(model)
    assert data.validate(model) == found
    (_, rows, _, split), images = calls[0]
    assert split == laid[0][0][3] == "validation"
    assert rows.tolist() == 32 * sum(data.validation, [])
    x = naive_units(model.encode_image(images)).view(32, 8, -1)
    classes = {f"{k}-shot": naive_units(x[16 : 16 + k].mean(0)) for k in (1, 4, 16)}
    texts = [[data.names[i]] for i in data.validation[0]]
    classes["zero-shot"] = cc.embed_classes(model, texts)
    for name, means in classes.items():
        hits = [(means @ q).argmax() == c for c in range(len(means)) for q in x[:16, c]]
        assert found[name] == approx(100 * np.mean(hits), abs=1e-3)


# ---- 6. Captions and images of your own ----------------------------------------------------------
def write_photos(folder, n=30):
    """n images of one colour each, with two captions each; every word comes often."""
    images = {f"Images/{i}.png": (8 * i, 240 - 8 * i, 99) for i in range(n)}
    animals = ["dogs", "cats", "birds", "cows"]
    rows = [f"{i}.png,a {w} of {animals[i % 4]}\n" for i in range(n) for w in ("photo", "view")]
    return write_files(folder, images | {"captions.txt": "image,caption\n" + "".join(rows)})


def photos_of(folder, *rows):
    """Photos, after more rows of their table."""
    if rows:
        with open(folder / "captions.txt", "a", encoding="latin-1") as file:
            file.write("\n".join(rows))
    return Photos("cpu", Settings(data=str(folder), batch_size=8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return photos_of(write_photos(tmp_path_factory.mktemp("photos")))


FORMATS = """captions.txt / Images / image,caption / {},{}
captions.txt / images / image_name,comment_number,comment / {},0,{}
results.csv / flickr30k_images / image_name| comment_number| comment / {}| 0| {}
train.tsv / . / filepath\ttitle / {}\t{}
metadata.csv / . / file_name,text / {},{}
table.csv / photos / \ufeffPATH;Split;Sentence / {};x;{}
table.csv / . / filename,image,caption / none.jpg,{},{}"""


@each("case", FORMATS.splitlines())
def test_tables_of_many_kinds_are_read(case, tmp_path):
    table, place, header, row = case.split(" / ")
    rows = [("1.jpg", "a dog"), ("2.jpg", "a cat"), ("2.jpg", "cats")]
    lines = [header, *(row.format(*pair) for pair in rows)]
    files = {f"{place}/{name}": (1, 2, 3) for name, _ in rows}
    write_files(tmp_path, files | {table: "\r\n".join(lines)})
    for source in (tmp_path, tmp_path / table):
        found = read_captions(source)
        assert [(path.name, text.strip()) for path, text in found if path.is_file()] == rows


def test_quoted_cells_hold_delimiters_quotes_and_line_breaks(tmp_path):
    captions = ["cats", 'a "big" dog, asleep', "two\nlines", "long " * 30000]
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["caption", "image"], *([text, "1.jpg"] for text in captions)])
        file.write('\n\na 5" screen,1.jpg')  # inches, after an empty line
    found = [caption for _, caption in read_captions(tmp_path)]
    assert found == [*captions, 'a 5" screen']


def test_a_quote_that_is_never_closed_is_named_by_its_line(tmp_path):
    text = 'image,caption\n1.jpg,"two\nlines"\n2.jpg,a cat\n3.jpg,"open\n4.jpg,a dog\n5.jpg,a cow'
    path = write_files(tmp_path, {"captions.csv": text}) / "captions.csv"
    with user_error("line 5: a quote opens there and is never closed"):
        read_captions(path)


def test_pairs_of_image_and_text(tmp_path):
    files = {"README.txt": "of no image", ".DS_Store": "", "a.txt": "a dog\nb\n", "Z.txt": "a cat"}
    files |= {"sub/front.txt": "a bird\r\n", "two/front.txt": "a cow"}
    images = "a.jpg Z.JPG sub/front.webp two/front.png ._a.jpg".split()
    found = read_captions(write_files(tmp_path, files | dict.fromkeys(images, "")))
    found = sorted(
        f"{path.relative_to(tmp_path).as_posix()} {text.strip()}" for path, text in found
    )
    expected = "Z.JPG a cat|a.jpg a dog|a.jpg b|sub/front.webp a bird|two/front.png a cow"
    assert "|".join(found) == expected


def test_rows_and_images_of_no_use_are_left_out_with_one_line(tmp_path, capsys):
    rows = "none.png,a dog|0.png,three,columns|0.png|1.png, .|broken.png,a cat|deep.png,a cow|,a"
    write_files(write_photos(tmp_path), {"Images/broken.png": b"\x89PNG\r\n"})
    Image.fromarray(np.full((8, 8), 9999, np.uint16)).save(tmp_path / "Images" / "deep.png")
    data = photos_of(tmp_path, *rows.split("|"), "x" * 300 + ",a", "2.png,caf\xe9", "2.png,last")
    assert data.counts.sum() == 61 and len(data.images) == 30
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match("left out: 9 captions, the first that of .*none.png: .Errno 2. No such", line)


def test_of_an_image_16_captions_are_kept(tmp_path, capsys):
    data = photos_of(write_photos(tmp_path), *(f"0.png,word{n}" for n in range(20000)))
    assert data.tokens.shape[:2] == (30, 16) and data.counts.max() == 16
    assert "left out: 19,986 captions" in capsys.readouterr().out


def test_captions_that_are_cut_and_unknown_words_are_counted(tmp_path):
    rows = [f"{n}.png,{'word ' * 31}w{n}{' cut' * (n < 7)}\n" for n in range(30)]
    write_files(write_photos(tmp_path), {"captions.txt": "image,caption\n" + "".join(rows)})
    expected = "27 images, 3 words, 3% unknown, 7 captions cut to 32 words"
    assert photos_of(tmp_path).about in (expected, expected.replace("3 w", "4 w"))


def test_a_tenth_is_held_out_wherever_the_folder_lies(tmp_path):
    def read(place, odd=None):
        for n in range(20):  # all of one base name
            text = 9 * ["seen ", "hidden "][n == odd]
            write_files(tmp_path / place / f"{n}", {"a.png": (9 * n, 0, 0), "a.txt": text})
        data = photos_of(tmp_path / place)
        return data, [red // 9 for red in data.images[:, 0, 0, 0].tolist()]

    data, names = read("a")
    assert data.n == 18 and sorted(names) == list(range(20)) != names  # by chance
    data, again = read("b/c", odd=names[-1])
    assert again == names and list(data.vocabulary) == ["<pad>", "<unk>", "seen"]


UNUSABLE = """it takes one table (captions.txt, a .csv, a .tsv), there are 0: train/metadata.csv
there are 0, or pairs of an image and a .txt, there are none: metadata.jsonl 0.png 1.jpg
there are 2, or pairs of an image and a .txt, there are none: a.csv b.tsv
its first line does not name an image and a caption: captions.txt"""


@each("case", UNUSABLE.splitlines())
def test_data_of_no_use_are_refused_in_one_line(case, tmp_path, capsys):
    message, names = case.split(": ")
    data = write_files(tmp_path, dict.fromkeys(names.split(), "image,title_id"))
    line = refuse(capsys, "--data", data, "--out", tmp_path / "out")
    assert message in line and str(data) in line


def test_fewer_images_than_a_batch_are_an_error(tmp_path):
    with user_error("7 images to train on are less than a batch"):
        photos_of(write_photos(tmp_path, 8))


def test_photos_are_those_of_the_folder_and_once_in_a_batch(photos):
    def draw():
        images, tokens = photos.draw_batch(Settings(batch_size=20))
        names = (images[:, 0].mean((1, 2)) * 255 / 8).round().int().tolist()
        captions = [" ".join(words[t] for t in row) for row in tokens]
        seen.update(zip(names, captions, strict=True))
        return {*names}

    words, seen, animals = list(photos.vocabulary), set(), ["dogs", "cats", "birds", "cows"]
    assert all(len(draw()) == 20 for _ in range(30))
    names = (photos.images[:27, 0, 0, 0] // 8).tolist()  # of those held out none is drawn
    pairs = {(n, f"a {word} of {animals[n % 4]}") for n in names for word in ("photo", "view")}
    assert seen == pairs and len(pairs) == 54


def test_each_photo_has_its_own_crop_and_mirror(photos, spy):
    calls = spy(cc, "resample")
    for _ in range(20):
        photos.draw_batch(Settings(batch_size=24))
    (_, _, b, c, d, e, f), _ = calls[0]
    assert b == d == 0 and min(len(x.unique()) for x in (c, e, f)) > 20
    a, c, e, f = (cat([given[n].flatten() for given, _ in calls]) for n in (1, 3, 5, 6))
    exact(a.abs(), e)  # a square
    for values, low in ((e * e, 0.5), (c / (1 - e), -1), (f / (1 - e), -1)):  # area, right, down
        assert low - 0.01 < values.min() < low + 0.05 and 0.95 < values.max() < 1.01
    assert a.sign().mean().abs() < 0.2


def test_recall_equals_a_plain_loop_where_equal_captions_are_right(photos):
    data, model = copy.copy(photos), make_model(photos, data="x")
    data.n = 6
    data.images = torch.randint(0, 256, (30, 3, 32, 32)).byte()
    data.tokens = torch.randint(2, 6, (30, 3, 7))
    data.tokens[::4, 2] = 0  # these have two captions
    data.tokens[10:20, 0] = data.tokens[29, 1]  # of eleven images
    x, ranks = naive_units(model.encode_image(data.images / 255)), []
    for caption in data.tokens[6:].flatten(0, 1):
        if caption.any():
            order = (x[6:] @ model.encode_text(caption[None])[0]).argsort(descending=True)
            right = [(data.tokens[6 + j] == caption).all(1).any() for j in order]
            ranks.append(right.index(True))  # of the nearest image that is right
    expected = {f"R@{k}": 100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)}
    assert data.validate(model) == approx(expected, abs=1e-3)


def test_own_captions_train_by_command(tmp_path, printed):
    data = write_photos(tmp_path / "data")
    run("--data", data, "--batch-size", 8, "--out", tmp_path)
    first, line, *_ = printed().splitlines()
    assert first.startswith("clip: cpu, 27 images, 10 words, 0% unknown, 0 captions cut to 32 word")
    assert re.match(r"clip  step 20  \d+ s  loss \d.\d+  R@1 \d+.\d  R@5 \d+.\d  R@10 ", line)


def test_images_of_every_kind_are_read_upright_and_in_colour(tmp_path):
    read = cc.preprocess(Settings(data="x"))
    image, exif = Image.new("RGB", (60, 32), "blue"), Image.Exif()
    image.paste("red", (14, 0, 30, 32))  # the left half of its middle
    exif[274] = 6  # turned to the right by 90 degrees
    image.convert("CMYK").save(tmp_path / "turned.jpg", exif=exif)
    for found in (read(image.quantize(4)), read(Image.open(tmp_path / "turned.jpg")).mT):
        red, _, blue = found
        assert red[:, 3:12].min() > 0.7 and blue[:, 20:-3].min() > 0.7 and len(red) == 32
    clear = Image.new("LA", (8, 8), (0, 128))  # on white
    close(read(clear), full((3, 32, 32), 127 / 255), rtol=0, atol=0.01)
    for kind in (np.uint16, np.int32, np.float32):
        with pytest.raises(ValueError, match="16-bit and float images are not read"):
            read(Image.fromarray(np.ones((8, 8), kind)))


def readme_recipes():
    """README.md's blocks of Python that turn captions of other formats into a table."""
    readme = HERE / "README.md"
    text = readme.read_text("utf-8") if readme.exists() else ""
    blocks = re.findall(r"```python\n(# (?:COCO|token).*?)```", text, re.DOTALL)
    return {block[2:6]: block for block in blocks}


COCO = r"""{"images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
"annotations": [{"image_id": 7, "caption": "a \"big\" dog, asleep"},
{"image_id": 8, "caption": "a cat"}, {"image_id": 8, "caption": "cats"}]}"""
TOKENS = """1.jpg#0\ta "big" dog, asleep
2.jpg#0\ta cat
2.jpg#1\tcats
"""


@pytest.mark.skipif(len(readme_recipes()) < 2, reason="README.md does not hold both recipes yet")
@each("kind", ["COCO", "toke"])
def test_the_recipes_of_the_readme_turn_other_formats_into_a_table(kind, tmp_path, monkeypatch):
    files = {f"{place}/{n}.jpg": (1, 2, 3) for place in ("train2017", "Images") for n in (1, 2)}
    files |= {"annotations/captions_train2017.json": COCO, "Flickr8k.token.txt": TOKENS}
    monkeypatch.chdir(write_files(tmp_path, files))
    exec(readme_recipes()[kind], {})
    (table,) = Path().rglob("captions.csv")
    assert table.read_text("utf-8").startswith("image,caption\n")
    found = [f"{path.name} {text}" for path, text in read_captions(table) if path.is_file()]
    assert found == ['1.jpg a "big" dog, asleep', "2.jpg a cat", "2.jpg cats"]


# ---- 7. The command line -------------------------------------------------------------------------
BAD = """contextclip --objective clop: it is one of clip, siglip, clixp, siglixp
contextclip --objective clip,: it is one of
contextclip --batch-size 1: at least: --steps, --image-size, --tau-max 1; --batch-size, --width 2
contextclip --steps 0: at least
contextclip --width 1: at least
contextclip --lr -1: at least
contextclip --image-size 0: at least
contextclip --weight-decay -1: at least
contextclip --tau-max 0: at least
contextclip --lr x: argument --lr: invalid float value: 'x'
contextclip --encoder resnet19: --encoder resnet19, --image-size 32: Unknown model
contextclip --encoder fcn_resnet50: --encoder fcn_resnet50, --image-size
contextclip --encoder alexnet: --encoder alexnet, --image-size
contextclip --data none: No such file or directory: 'none'
contextclip --data '': --data is empty
contextclip --init none.pt: none.pt: no checkpoint of this version
contextclip --init foreign.pt: foreign.pt: no checkpoint of this version
contextclip --init cut/clip.pt: clip.pt: no checkpoint of this version
contextclip --init words/clip.pt: --init: that model has other words
contextclip --out foreign.pt: File exists: 'foreign.pt'
contextclip --out cut --resume: clip.pt: no checkpoint of this version
fewshot --out none: no checkpoint in none: python contextclip.py trains some
fewshot --checkpoint none.pt: none.pt: no checkpoint of this version
fewshot --checkpoint old/clip.pt words/clip.pt: models of other captions
fewshot --checkpoint old/clip.pt more/clixp.pt: these folders hold different models
fewshot --out old --shots 0 1: 1 or more
fewshot --out old --plate: --plate is laid over the images of --data
fewshot --out old --data '': no such folder, nor one of MNIST
fewshot --out old --data none: no such folder, nor one of MNIST
fewshot --out old --data classes --shots 9: a class has 3 images, 25 are needed
fewshot --out old --data classes/a: find any class folder
fewshot --out old --data parts: name the folder that holds the class folders
fewshot --out old --data broken --shots 1 --queries 1: 0.png: cannot identify image file"""


@pytest.fixture(scope="session")
def bad_files(cards, tmp_path_factory):
    folder, other = tmp_path_factory.mktemp("bad"), copy.copy(cards)
    train(cards, folder / "old", "clip", steps=1)
    other.vocabulary = {f"{n}": n for n in range(220)}
    train(other, folder / "words", "clip", steps=1)
    whole = (folder / "old" / "clip.pt").read_bytes()
    for part in ("classes", "parts/Training", "parts/Testing"):
        write_classes(folder / part, "ab", 3)
    files = {"foreign.pt": "no", "cut/clip.pt": whole[:9999], "more/clixp.pt": whole}
    return write_files(folder, files | {f"broken/a/{n}.png": "no image" for n in range(2)})


@each("case", BAD.splitlines())
def test_bad_input_is_one_line_and_exit_status_2(case, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    before = sorted(Path().rglob("*.*"))
    command, message = case.split(": ", 1)
    name, *arguments = shlex.split(command)
    line = refuse(capsys, "--out", "new", *arguments, program={"fewshot": fs}.get(name, cc))
    assert line.startswith(f"{name}: error: ") and message in line
    assert sorted(Path().rglob("*.*")) == before


def test_a_batch_is_divided_evenly_between_processes(capsys, tmp_path, patch):
    patch(cc, "WORLD_SIZE", 3)
    assert "--batch-size 16: not a multiple of 3" in refuse(capsys, "--out", tmp_path)


def test_help_names_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = " ".join(capsys.readouterr().out.split())
    defaults = asdict(Settings()) | {"objective": "clip,clixp"}
    for name, default in defaults.items():
        name = name.replace("_", "-")
        assert re.search(rf"--{name}( X)? \w((?! --).)+ \({default}\)", text), name


@each("name", ["contextclip.py", "fewshot.py"])
def test_a_script_runs_where_its_source_is_not_at_hand(name):
    with open(HERE / name) as source:
        output, errors = start_process("-", "--help", stdin=source).communicate(timeout=60)
    assert "--out" in output and not errors


# ---- fewshot.py: 1. classifiers ------------------------------------------------------------------
def hyper_of(name):
    """Values from the middle of a classifier's grid."""
    return {key: values[len(values) // 2] for key, values in fs.CLASSIFIERS[name][1].items()}


def episode(shots=3):
    """x, X, Y, T, scale in float64, of four classes."""
    x, X, T = (F.normalize(torch.randn(n, 6).double()) for n in (7, 4 * shots, 4))
    return x, X, eye(4).double().repeat(shots, 1), T, tensor(2.0).double()


# The scores (4,) of one query q; row r of X is of class r % 4.
def naive_tip(q, X, T, scale, a, b, g=0.0):
    cosines, p = X @ q, (T @ q / 0.1).softmax(0)
    kl = (p * (p / (X @ T.T / 0.1).softmax(1)).log()).sum(1)
    low, high = cosines.aminmax()
    stretched = low + (high - low) * (kl.max() - kl) / (kl.max() - kl.min())
    values = a * (-b * (1 - cosines)).exp() + g * stretched
    return scale * T @ q + values.view(-1, 4).sum(0)


def naive_gda(q, X, T, scale, shrink, trust=0.0):
    M = X.view(-1, 4, 6).mean(0)
    S = sum(torch.outer(row, row) for row in X - M.repeat(len(X) // 4, 1)) / len(X)
    S = (1 - shrink) * S + shrink * S.trace() / 6 * eye(6)
    W = M @ torch.linalg.inv(S)
    return W @ q - (W * M).sum(1) / 2 + trust * scale * T @ q


def naive_vote(q, X, T, scale, k, weight):
    scores, cosines, k = torch.zeros(4).double(), X @ q, min(k, len(X))
    for rank, i in enumerate(cosines.argsort(descending=True)[:k]):
        weights = {"softmax": math.exp(cosines[i] / 0.07), "rank": 1 / (2 + rank)}
        scores[i % 4] += weights.get(weight, 1 + (k - rank) / (k * (k + 1)))
    return scores


NAIVE = {
    "zero-shot": lambda q, X, T, scale: T @ q,
    "prototypes": lambda q, X, T, scale: naive_units(X.view(-1, 4, 6).mean(0)) @ q,
    "Tip": naive_tip,
    "GDA": naive_gda,
    "vote": naive_vote,
}


@each("shots", [2, 5])
@each("name", list(fs.CLASSIFIERS)[:-2])
def test_classifiers_equal_their_formulas(name, shots):
    x, X, Y, T, scale = episode(shots)
    (naive,) = (function for key, function in NAIVE.items() if key in name)
    scores = fs.CLASSIFIERS[name][0](x, X, Y, T, scale, **hyper_of(name))
    expected = stack([naive(q, X, T, scale, **hyper_of(name)) for q in x])
    close(scores, expected, rtol=1e-5, atol=1e-5)


def test_gda_of_one_shot_is_the_prototype_classifier():
    given = episode(shots=1)
    assert equal(fs.gda(*given, shrink=0.1).argsort(1), fs.prototypes(*given).argsort(1))


def test_the_linear_probe_is_where_its_loss_has_no_slope():
    _, X, Y, T, scale = episode(5)
    x = cat((torch.zeros(1, 6), eye(6))).double()
    c, *W = fs.linear_probe(x, X, Y, T, scale, l2=1e-2)  # linear: read off
    parameters = [c.requires_grad_(), (stack(W) - c).detach().requires_grad_()]
    loss = F.cross_entropy(X @ parameters[1] + c, Y) + 5e-3 * parameters[1].square().sum()
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, parameters))


def test_tip_adapter_f_trains_keys_by_the_others_of_the_support():
    x, X, Y, T, scale = episode(8)
    keys = X.clone().requires_grad_()  # one step of AdamW, whose decay is 0.01, by hand
    near = (5 * (X @ keys.T - 1)).exp() * (1 - eye(32))
    (g,) = torch.autograd.grad(F.cross_entropy(scale * X @ T.T + near @ Y, Y), keys)
    keys = keys.detach() * (1 - 1e-2 * 1e-2) - 1e-2 * g / (g.abs() + 1e-4)
    for steps, trained in enumerate([X, keys]):
        found = fs.tip_adapter_f(x, X, Y, T, scale, a=1.0, b=5.0, lr=1e-2, steps=steps)
        close(found, fs.tip_adapter(x, trained, Y, T, scale, 1, 5), rtol=1e-4, atol=1e-5)


@each("name", fs.CLASSIFIERS)
def test_random_embeddings_give_chance_and_separable_ones_100_percent(name):
    h = hyper_of(name)
    x, X, T = (F.normalize(torch.randn(10 * n, 32)) for n in (200, 4, 1))
    assert abs(fs.accuracy(name, (x, X, T, 10.0), 4, h) - 10) < 3
    more = cat((T, T.roll(1, 0)))  # support beyond the shots asked for, of wrong classes
    assert fs.accuracy(name, (T.repeat(3, 1), more, T, 10.0), 1, h) == 100


def test_text_scale_is_the_likeliest_and_0_for_captions_that_say_nothing():
    _, X, Y, T, _ = episode(shots=5)
    scales = [0, *(10.0 * 2.0**i for i in range(-6, 1))]
    for text in (T, X[:4], X[:4].roll(1, 0)):
        fits = [((s * X @ text.T).softmax(1) * Y).sum(1).log().sum() for s in scales]
        assert fs.text_scale(X, Y, text, 10.0) == scales[np.argmax(fits)]


# ---- 2. tasks ------------------------------------------------------------------------------------
def test_there_are_21_tasks_in_three_groups_apart_from_training(cards, patch):
    def draw_cards(cards, characters, numbers, split):
        assert cards.has_glyph[characters, FACE_SPLITS[split]].any(1).all()
        faces.add((task.group, split))
        return numbers

    patch(cc, "draw_cards", draw_cards)
    tasks, faces, names = fs.card_tasks(cards), set(), {}
    for task in [*tasks, fs.CardTask(cards, "v", sum(cards.validation, []), "validation")]:
        assert task.draw(0, 1, 1).max() > 500
        for (name,) in task.captions:
            assert names.setdefault(name, task.group) == task.group
    assert len(tasks) == 21 and all(10 <= len(task.captions) <= 40 for task in tasks)
    text = " ".join(sum(sorted(faces), ()))
    assert text == "combined test seen test unseen train validation validation"
    trained = {cards.names[i] for i in cards.train}
    for name, group in names.items():
        assert (name in trained) == (group == "seen")
        assert group != "combined" or cards.vocabulary.keys() >= {*split_words(name)}


def write_classes(folder, names, n=10):
    """A folder per class, of n images, all different."""
    for c, name in enumerate(names):
        write_files(folder / name, {f"{i}.png": 3 * (20 * i + 5 * c,) for i in range(n)})
    return folder


def read_images(source, **changes):
    """The arguments of an OwnTask, by those of the command line."""
    given = {"out": Path("x"), "shots": [2], "queries": 3, "template": ["a {}", "{}!"]}
    return fs.read_images(str(source), Namespace(**given | changes), make_model())


def nested(task):
    """Images of four shots, of which the first are those of two."""
    few, many = (task.draw(0, shots, 3) for shots in (2, 4))
    assert equal(few, many[: len(few)]) and len(many) == 7 * len(task.captions)
    assert len(many.flatten(1).unique(dim=0)) == len(many)
    assert not equal(few, task.draw(1, 2, 3))
    return many


def test_supports_are_nested_and_queries_the_same_for_all_shots(cards, spy):
    (task,) = fs.card_tasks(cards, ["digits"])
    calls = spy(cc, "draw_cards")
    nested(task)
    rows = cat([given[1] for given, _ in calls[:3]])
    assert rows.tolist() == 5 * task.members  # row r is of class r % C


def test_own_images_are_nested_and_captioned(tmp_path):
    task = fs.OwnTask(*read_images(write_classes(tmp_path, ["3", "red_fox", "0 - zero"])))
    assert task.captions == [["a zero", "zero!"], ["a three", "three!"], ["a red fox", "red fox!"]]
    shades = (255 * nested(task)[:, 0, 0, 0]).round().view(7, 3)
    assert (shades % 20 == tensor([10, 0, 5])).all()  # row r is of class r % 3


def make_tasks(data, model, **changes):
    """Those evaluated and those of validation, by the arguments of the command line."""
    given = {"plate": False, "shots": [2], "queries": 3, "template": ["{}"]}
    return fs.make_tasks(Namespace(data=[str(data)], **given | changes), model, "cpu")


def test_models_of_own_captions_choose_on_one_half_and_are_judged_on_the_other(photos, tmp_path):
    model, data = make_model(photos, data="x"), write_classes(tmp_path, "abc")
    halves = sum(make_tasks(data, model), [])
    images = cat([task.draw(0, 2, 3) for task in halves])
    assert images.shape == (30, 3, 32, 32) and len(images.flatten(1).unique(dim=0)) == 30
    with user_error("a class has 5 images, 6 are needed"):
        make_tasks(data, model, shots=[3])


def test_plates_are_laid_over_own_images_in_their_shades(spy, tmp_path):
    image, calls = Image.new("L", (32, 32), 200), spy(cc, "lay_plates")
    image.paste(50, (10, 14, 20, 18))
    for path in write_classes(tmp_path, "ab").glob("*/*"):
        image.save(path)
    ((task,), _) = make_tasks(tmp_path, make_model(), plate=True)
    (_, _, numbers, split, background, ink), _ = calls[0]
    close(255 * (background + 10 * ink), full((20, 1, 1), 700.0))
    assert split == "test" and len(numbers.unique()) > 1


def digits(root, train, transform, download):
    assert download and not train
    data = torchvision.datasets.FakeData(14, (3, 16, 16), 2, transform)
    data.targets, data.classes = 7 * [0, 1], ["0 - zero", "1 - one"]
    return data


def test_torchvision_datasets_by_name(patch):
    assert all(hasattr(torchvision.datasets, name) for name in fs.DATASETS)
    patch(torchvision.datasets, "KMNIST", digits)
    assert nested(fs.OwnTask(*read_images("KMNIST"))).shape == (14, 1, 32, 32)


# ---- 3. evaluation, 4. results, 5. the command line ----------------------------------------------
@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with clip.pt and clixp.pt, hardly trained."""
    out = tmp_path_factory.mktemp("runs")
    run("--out", out)
    return out


def evaluate(out, *arguments):
    """A short evaluation -> its rows."""
    few = "--shots 1 2 --seeds 2 --queries 2 --methods".split()
    run(*few, *arguments, "--out", out, program=fs)
    return read_rows(out / "fewshot.csv")


def test_a_small_evaluation_from_end_to_end(trained, tmp_path, printed):
    out = shutil.copytree(trained, tmp_path / "out")
    rows = evaluate(out, "GDA + text", "--tasks", "digits", "Hebrew")
    # models, draws, ( tasks, methods, shots, zero-shot)
    assert len(rows) == 2 * 2 * (2 * 7 * 2 + 1)
    assert {row["task"] for row in rows if row["method"] == "zero-shot"} == {"digits"}
    assert "clixp - clip" in printed()
    Image.open(out / "accuracy_vs_shots.png").verify()


def test_results_are_printed_even_when_they_cannot_be_written(trained, printed):
    checkpoints = sorted(trained.glob("*.pt"))
    with pytest.raises(SystemExit, match="2"):
        evaluate(trained / "clip.pt" / "out", "--tasks", "digits", "--checkpoint", *checkpoints)
    assert "sample efficiency:" in printed()


EQUAL = [("1 2 10 11", "{}"), ("n01440764 n02102040", "a {}"), ("one two", 40 * "a " + "{}")]


@each("names, template", [*EQUAL, ("one two", "{}"), ("one two", 20 * "a " + "{}")])
def test_classes_with_equal_captions_have_no_zero_shot(names, template, trained, tmp_path, printed):
    data = write_classes(tmp_path / "data", names.split())
    out = shutil.copytree(trained, tmp_path / "out")
    rows = evaluate(out, "--data", data, "--template", template)
    equal = (names, template) in EQUAL
    assert printed().count("some classes have the same caption: no zero-shot\n") == equal
    assert ("zero-shot" in {row["method"] for row in rows}) != equal


def test_many_long_templates_are_compared_whole(tmp_path):
    templates = 40 * [15 * "c " + "{}" + 15 * " c"]
    assert read_images(write_classes(tmp_path, "ab"), template=templates)[1] == "own"


def test_hyperparameters_are_the_best_of_their_grid_and_the_first_of_equal_ones(patch):
    patch(fs, "accuracy", lambda method, e, shots, h: e - abs(h["k"] - 3 * shots))
    patch(fs, "episodes", lambda *_: [(0,), (1,)])
    chosen = list(fs.choose(None, None, ["rank vote"], [1, 2], 2))
    assert chosen == [("rank vote", k, {"weight": "rank", "k": 4}) for k in (1, 2)]


def test_draws_of_one_run_count_and_of_several_runs_their_means():
    rows = []
    for value in (1, 3, 5, 7):  # of two tasks or of two runs, two draws each
        for i, name in enumerate(fs.TRAINING_FREE):
            cell = {"model": "clip", "method": name, "shots": 1, "accuracy": value + i}
            rows.append(cell)
    for runs, expected in ((1, [[3.5, 5.5], [7.5, 9.5]]), (2, [[4.5, 8.5]])):
        assert fs.tabulate(rows, [1], runs, 2)["clip"][fs.MEAN, 1].tolist() == expected


def test_the_interval_covers_the_mean_in_95_of_100_cases():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        values = rng.normal(size=(12, 12)) + rng.normal(size=(12, 1)) + rng.normal(size=12)
        mean, width = fs.interval(values)
        hits += abs(mean) <= width
    assert 364 <= hits <= 396
    values = np.array([[1.0, 2.0, 4.0]])
    assert fs.interval(values) == approx((7 / 3, 4.30 * values.std(ddof=1) / 3**0.5))


def test_sample_efficiency_by_hand_and_over_plateaus():
    found = fs.efficiency([10, 20, 40], [20, 30, 50], [1, 2, 4])
    assert found == approx({1: 2, 2: 2**1.5 / 2, 4: math.inf})
    for curve, shots in (([80, 100, 100, 100, 100], [1, 2]), ([50, 40, 60], [1, 4])):
        assert fs.efficiency(curve, curve, [1, 2, 4, 8, 16]) == dict.fromkeys(shots, 1.0)


def test_the_report_is_of_context_less_base(printed):
    base = np.array([[1.0, 2.0], [5.0, 6.0], [1.0, 2.0]])
    values = {"siglip": base, "siglixp": base + [[2], [-1], [2]]}
    table = {name: {(fs.MEAN, 4): v, ("zero-shot", 0): v[:2]} for name, v in values.items()}
    fs.report(table, [4])
    text = " ".join(printed().split())
    assert "siglip 4-shot mean of the six 2.8 zero-shot, 2 tasks: 3.5" in text
    assert "siglixp - siglip 4-shot mean of the six +1.0 ± 4.3 zero-shot, 2 tasks: +0.5" in text
    assert "tasks that gain, of 3: 2 mean of the six, 4 shots and more: +1.0 ± 4.3" in text
    assert text.endswith("sample efficiency: 4-shot inf")
