"""Tests of contextclip.py and fewshot.py: `python -m pytest`. Offline, on the CPU, a minute.

The first test can be checked by hand; the others follow the sections of the two scripts.
"""

import copy
import csv
import io
import math
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFont
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

import contextclip as cc
import fewshot as fs
from contextclip import FACE_SPLITS, Cards, LIxPLoss, Photos, Settings, UserError, split_words

HERE = Path(__file__).parent
SMALL = {"steps": 40, "batch_size": 16, "width": 16, "float32": True}
FLAGS = "--steps 40 --batch-size 16 --width 16 --float32 --cpu".split()
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
        yield Cards(torch.device("cpu"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with clip.pt and clixp.pt, hardly trained."""
    out = tmp_path_factory.mktemp("runs")
    run(f"contextclip --out {out}")
    return out


def run(command):
    """A command line in this process, "contextclip ..." of a small model or "fewshot ..."."""
    name, *arguments = shlex.split(command)
    if name == "contextclip":
        cc.main(FLAGS + arguments)
    else:
        fs.main(["--cpu", *arguments])


def refuse(capsys, command):
    """The one line with which a command ends, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(command)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def small(objective="clixp", **changes):
    return Settings(objective, **SMALL | changes)


def new_model(vocabulary=None, **changes):
    """A small model that is not trained."""
    torch.manual_seed(0)
    model = cc.ContextCLIP(small(**changes), vocabulary or Noise.vocabulary)
    return model.eval().requires_grad_(False)


def units(*shape):
    """Random vectors of length 1, in float64."""
    return F.normalize(torch.randn(*shape).double(), dim=-1)


def write_files(folder, files):
    """Write {path: text or, for an image, its colour}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (44, 32), content).save(path)
        else:
            path.write_text(content, encoding="utf-8", newline="")
    return folder


def write_classes(folder, names, n=10):
    """A folder per class, of n images, all different: class c has the shades 5 c, 5 c + 20, ..."""
    for c, name in enumerate(names):
        write_files(folder / name, {f"{i}.png": (20 * i + 5 * c,) * 3 for i in range(n)})
    return folder


def read_rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- A loss by hand ------------------------------------------------------------------------------
def test_a_batch_of_two_pairs_by_hand():
    # Two images v, two captions u, d = 2. All temperatures are 1.
    #   v_1 = (2, 0)  v_2 = (0, 1)  u_1 = (1, 0)  u_2 = (0, 3)
    # Of length 1 they are x_1 = t_1 = (1, 0), x_2 = t_2 = (0, 1).
    # Plain: an image has cosine 1 with its caption and 0 with the other, as has a caption with its
    # image; each of the four cross-entropies is log(e^1 + e^0) - 1 = 1.3133 - 1 = 0.3133.
    # Context: an image may not attend to itself, so it becomes the other one: (0, 1) and, after
    # (2, 0) is normalised, (1, 0). Now the cosine is 0 with the own caption and 1 with the other:
    # log(e^0 + e^1) - 0 = 1.3133.
    # Loss: 0.9 * 0.3133 + 0.1 * 1.3133 = 0.4133.
    criterion = LIxPLoss(Settings("clixp", width=2, alpha=0.9))
    criterion.log_tau.data.zero_()
    v = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    u = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    loss, plain, context = criterion(v, u)
    assert plain.item() == pytest.approx(0.3133, abs=1e-4)
    assert context.item() == pytest.approx(1.3133, abs=1e-4)
    assert loss.item() == pytest.approx(0.4133, abs=1e-4)


# ---- contextclip.py: 1. Contrastive losses, 2. The loss with context -----------------------------
def naive_clip(x, t, tau, b):
    loss = 0
    for i in range(len(x)):
        to_text = torch.stack([tau * x[i] @ t_j for t_j in t])
        to_image = torch.stack([tau * x_j @ t[i] for x_j in x])
        loss += (to_text.exp().sum().log() + to_image.exp().sum().log()) / 2 - to_text[i]
    return loss / len(x)


def naive_siglip(x, t, tau, b):
    loss = 0
    for i, x_i in enumerate(x):
        for j, t_j in enumerate(t):
            z = 1 if i == j else -1
            loss += (1 + (-z * (tau * x_i @ t_j + b)).exp()).log()
    return loss / len(x)


def naive_context(x, values, tau_ctx, mask):
    rows = []
    for i in range(len(x)):
        weighted = total = 0
        for j in range(len(x)):
            if i != j or not mask:
                weight = (x[i] @ x[j] / (tau_ctx * x.shape[1] ** 0.5)).exp()
                weighted += weight * values[j]
                total += weight
        rows.append(weighted / total)
    return torch.stack(rows)


def naive_lixp(v, u, criterion):
    settings = criterion.settings
    L = naive_siglip if "sig" in settings.objective else naive_clip
    tau_1, tau_2, tau_ctx = criterion.log_tau.exp()
    b_1, b_2 = criterion.b
    x, t = F.normalize(v), F.normalize(u)
    plain = L(x, t, tau_1, b_1)
    if "xp" not in settings.objective:
        return plain, plain, torch.zeros_like(plain)
    if settings.shared_temperature:
        tau_2, b_2 = tau_1, b_1
    values = v.detach() if settings.detach_values else v
    x_ctx = naive_context(x, values, tau_ctx, not settings.no_mask)
    context = L(F.normalize(x_ctx), t, tau_2, b_2)
    return settings.alpha * plain + (1 - settings.alpha) * context, plain, context


@pytest.mark.parametrize("B", [2, 3, 9])
@pytest.mark.parametrize("switch", ["float32", "no_mask", "shared_temperature", "detach_values"])
@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_losses_and_gradients_equal_naive_loops(objective, switch, B):
    settings = Settings(objective, width=6, alpha=0.7, **{switch: True})
    criterion = LIxPLoss(settings).double()
    criterion.log_tau.data = torch.tensor([2.7, 4.5, 0.15]).double().log()
    criterion.b.data = torch.tensor([-1.0, -2.0]).double()
    v, u = torch.randn(2, B, 6).double().requires_grad_()
    inputs = [v, u, criterion.log_tau, criterion.b]
    expected = naive_lixp(v, u, criterion)
    gradients = torch.autograd.grad(expected[0], inputs, materialize_grads=True)
    for settings.chunk in (0, 1, 5, 100):
        found = criterion(v, u)
        assert_close(found, expected)
        # no gradient is missing, as DistributedDataParallel needs
        assert_close(torch.autograd.grad(found[0], inputs), gradients)


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_gradients_are_finite_at_the_highest_temperature(objective):
    criterion = LIxPLoss(Settings(objective, width=16))
    criterion.log_tau.data[:2] = math.log(100)
    v, u = (1000 * torch.randn(2, 64, 16)).requires_grad_()
    loss, *_ = criterion(v, u)
    for gradient in torch.autograd.grad(loss, [v, u, criterion.log_tau, criterion.b]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_in_blocks_no_matrix_of_the_batch_is_kept(objective):
    def numbers_kept(chunk):
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        v, u = torch.randn(2, 256, 16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            LIxPLoss(Settings(objective, width=16, chunk=chunk))(v, u)
        return sum(x.numel() for x in kept.values())

    assert numbers_kept(chunk=0) > 256 * 256
    assert numbers_kept(chunk=32) < 0.8 * 256 * 256


STARTS = [("clixp", 100.0, 5), ("siglixp", 100.0, 10), ("siglixp", 3.0, 3)]


@pytest.mark.parametrize("objective, cap, tau", STARTS)
def test_learned_scalars_start_as_documented_and_below_their_cap(objective, cap, tau):
    scalars = LIxPLoss(Settings(objective, width=512, tau_max=cap)).scalars()
    expected = {"tau_1": tau, "tau_2": tau, "tau_ctx": 0.25 / 512**0.5, "b_1": -10, "b_2": -10}
    assert {name: value.item() for name, value in scalars.items()} == pytest.approx(expected)


def test_clamp_keeps_temperatures_between_1_and_their_cap():
    criterion = LIxPLoss(Settings(tau_max=9.0))
    criterion.log_tau.data = torch.tensor([0.5, 50.0, 1e-3]).log()
    criterion.clamp()
    assert_close(criterion.log_tau.exp(), torch.tensor([1.0, 9.0, 1e-3]))


def test_the_default_objective_has_context():
    assert Settings(alpha=0.5).has_context


SHAPES = [(1, 1, 64, "a batch of one pair"), (63, 64, 64, "both are"), (8, 8, 512, "width 64")]


@pytest.mark.parametrize("images, texts, d, message", SHAPES)
def test_embeddings_of_a_wrong_shape_are_refused(images, texts, d, message):
    with pytest.raises(ValueError, match=message):
        LIxPLoss(Settings(width=64))(torch.randn(images, d), torch.randn(texts, d))


# Several processes. They are forked from one that has imported contextclip and no more: a fork of
# pytest's own would not survive where autograd has threads for a GPU.
@pytest.fixture(scope="session")
def forked():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_contextclip"])
    return context


def losses_and_gradients(part, objective, chunk, kind):
    """Of a part of a batch of 12, of which the rest is in other processes."""
    model = new_model(objective=objective, chunk=chunk, image_size=8)
    images, tokens = torch.rand(12, 1, 8, 8), torch.randint(2, 6, (12, 5))
    if kind == "no gradients":
        return torch.stack(model(images[part], tokens[part])), {}
    model.requires_grad_()
    model.image_encoder.requires_grad_(kind != "frozen images")
    forward = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    losses = torch.stack(forward(images[part], tokens[part]))
    losses[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses.detach(), gradients


KINDS = [(objective, chunk, "all") for objective in cc.OBJECTIVES for chunk in (0, 3)]
KINDS += [("siglixp", 3, "frozen images"), ("clixp", 0, "no gradients")]


def join_late(rank, folder):
    """One of two processes; it joins their group long after the import."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    part = slice(6 * rank, 6 * rank + 6)
    torch.save({kind: losses_and_gradients(part, *kind) for kind in KINDS}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_processes(forked, tmp_path_factory):
    """What both processes found, {kind: (losses, gradients)}."""
    folder = tmp_path_factory.mktemp("group")
    processes = [
        forked.Process(target=join_late, args=(rank, folder), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_forked_processes_have_the_loss_and_gradients_of_one(kind, two_processes):
    losses, gradients = losses_and_gradients(slice(12), *kind)
    (losses_0, gradients_0), (losses_1, gradients_1) = (found[kind] for found in two_processes)
    assert_close((losses_0 + losses_1) / 2, losses)
    assert_close(gradients_0, gradients, rtol=1e-4, atol=1e-5)
    assert_close(gradients_1, gradients, rtol=1e-4, atol=1e-5)


# ---- 3. Text -------------------------------------------------------------------------------------
def test_captions_become_words_in_lower_case():
    caption = "A  Dog's ball, red-blue! Straße 12 … Ж, é"
    assert split_words(caption) == "a dog s ball red-blue straße 12 ж é".split()


@pytest.mark.parametrize("caption", ["日本語", "ひらがな", "สวัสดี", "ភាសា"])
def test_scripts_without_spaces_are_split_by_letter(caption):
    assert split_words(f"a {caption}") == ["a", *caption]


@pytest.mark.parametrize("word", ["தமிழ்", "हिन्दी", "שָׁלוֹם", "كِتَابٌ"])
def test_words_with_combining_marks_stay_whole(word):
    assert split_words(f"a {word} b") == ["a", unicodedata.normalize("NFC", word), "b"]


def test_hindi_words_that_differ_in_marks_have_different_tokens():
    vocabulary = cc.build_vocabulary(["काला कीला कुला"])
    assert cc.tokenize("काला कीला कुला", vocabulary).tolist() == [[2, 3, 4]]


def test_a_decomposed_word_is_the_composed_one():
    assert split_words(unicodedata.normalize("NFD", "forêt")) == ["forêt"]


def test_a_vocabulary_has_the_words_that_come_often():
    captions = ["b a", "b café", "a b"]
    assert cc.build_vocabulary(captions, min_count=2) == {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}


TOKENS = [
    (["A zzz B", "", "b"], [[2, 1, 3], [1, 0, 0], [3, 0, 0]]),
    ("a b", [[2, 3]]),  # one caption, not three
    (["a " * 99], [32 * [2]]),
]


@pytest.mark.parametrize("captions, tokens", TOKENS)
def test_captions_become_tokens(captions, tokens):
    assert cc.tokenize(captions, {"a": 2, "b": 3}).tolist() == tokens


def test_a_text_depends_on_its_order_but_not_on_padding():
    a, b = new_model().encode_text(torch.tensor([[2, 5, 0], [5, 2, 0]]))
    (c,) = new_model().encode_text(torch.tensor([[5, 2]]))
    assert (a - b).abs().max() > 1e-3
    assert_close(b, c)


# ---- 4. Model ------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"number_share": 0.0}, {"data": "x"}])
def test_the_text_of_a_class_is_the_mean_of_its_captions_and_of_ten_numbers(cards, changes):
    model = new_model(cards.vocabulary, **changes)
    endings = [""] if changes else [f" number {n} {n} {n}" for n in cc.NUMERALS]
    texts = [caption + ending for caption in ("digit one", "one") for ending in endings]
    t = F.normalize(model.encode_text(cc.tokenize(texts, cards.vocabulary)))
    _, found = cc.embed_classes(model, [["greek", "letter a"], ["digit one", "one"]])
    assert_close(found, F.normalize(t.mean(0), dim=0))


# ---- 5. Training ---------------------------------------------------------------------------------
class Noise:
    """Data that mean nothing, quickly drawn. Their batch number `stop` interrupts a run."""

    device = torch.device("cpu")
    vocabulary = cc.build_vocabulary(["a b c d"])
    about = "noise"

    def __init__(self, stop=0):
        self.stop, self.batches = stop, []

    def draw_batch(self, settings):
        images = torch.rand(settings.batch_size, 1, 32, 32)
        self.batches.append(images)
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        return images, torch.randint(2, 6, (settings.batch_size, 3))

    def validate(self, model):
        return {"always": 50.0}


def batch_of(tmp_path, step, **changes):
    """The images that a run is given at a step."""
    data = Noise(stop=step)
    with pytest.raises(KeyboardInterrupt):
        cc.train(small(**changes), data, tmp_path)
    return data.batches[-1]


def test_a_batch_is_the_same_for_all_objectives_and_lengths(tmp_path):
    a = batch_of(tmp_path, 2, objective="clip")
    torch.rand(1)
    assert a.equal(batch_of(tmp_path, 2, objective="siglixp", steps=30))


def test_a_batch_is_another_for_each_step_seed_and_process(tmp_path, monkeypatch):
    batches = [batch_of(tmp_path, 1), batch_of(tmp_path, 2), batch_of(tmp_path, 1, seed=1)]
    monkeypatch.setattr(cc, "rank", lambda: 1)
    batches.append(batch_of(tmp_path, 1))
    assert len(torch.stack(batches).unique(dim=0)) == 4


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_training_lowers_the_loss(objective, tmp_path):
    data = Noise()
    batch = data.draw_batch(small())
    data.draw_batch = lambda settings: batch
    cc.train(small(objective, steps=60, lr=5e-3), data, tmp_path)
    first, *_, last = read_rows(tmp_path / f"{objective}.csv")
    assert float(last["loss"]) < 0.8 * float(first["loss"])


def test_weight_decay_is_for_matrices_and_the_learning_rate_for_all(tmp_path):
    cc.train(small(steps=1, lr=0.5, weight_decay=0.3), Noise(), tmp_path)
    _, optimizer, _ = cc.read_checkpoint(tmp_path / "clixp.pt")
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_the_learning_rate_has_a_warm_up_and_a_cosine():
    rates = [cc.learning_rate(step, Settings(steps=100, lr=4.0)) for step in (1, 5, 51)]
    assert rates == pytest.approx([0.8, 2 + 2 * math.cos(0.04 * math.pi), 2])


def test_alpha_one_is_the_baseline_bit_for_bit(cards, tmp_path):
    cc.train(small("clip"), cards, tmp_path)
    cc.train(small("clixp", alpha=1.0), cards, tmp_path)
    a, b = (cc.load(tmp_path / name).state_dict() for name in ("clip.pt", "clixp.pt"))
    assert_close(a, b, rtol=0, atol=0)


def assert_equal_runs(*paths):
    """All that two runs saved is the same bit for bit, but the seconds."""
    tensors, logs = [], []
    for path in paths:
        model, optimizer, log = cc.read_checkpoint(path)
        tensors.append([model.state_dict(), optimizer.state_dict()["state"]])
        logs.append([row | {"seconds": 0} for row in log])
    assert_close(*tensors, rtol=0, atol=0)
    assert logs[0] == logs[1]


def test_an_interrupted_and_resumed_run_is_the_whole_one(cards, tmp_path, monkeypatch):
    def stop(step, settings, learning_rate=cc.learning_rate):
        return interrupt() if step == 50 else learning_rate(step, settings)

    cc.train(small(steps=60), cards, tmp_path)
    whole = (tmp_path / "clixp.pt").rename(tmp_path / "whole.pt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cc, "learning_rate", stop)
        cc.train(small(steps=60), cards, tmp_path)
    assert not cc.load(tmp_path / "clixp.pt").finished
    cc.train(small(steps=60), cards, tmp_path)
    assert_equal_runs(whole, tmp_path / "clixp.pt")


def interrupt(*_):
    raise KeyboardInterrupt


def run_alone(command):
    cc.EVERY = 20
    torch.set_num_threads(1)
    run(command)


def test_a_killed_process_is_resumed_exactly(forked, photos_folder, tmp_path):
    command = f"contextclip --objective clixp --data {photos_folder} --batch-size 8 --steps 120"
    parts = tmp_path / "parts"
    process = forked.Process(target=run_alone, args=(f"{command} --out {parts}",))
    process.start()
    while process.is_alive() and not (parts / "clixp.csv").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not cc.load(parts / "clixp.pt").finished
    run(f"{command} --out {parts} --resume")
    run(f"{command} --out {tmp_path}")
    assert_equal_runs(tmp_path / "clixp.pt", parts / "clixp.pt")


CHANGES = {
    "captions": lambda data: write_photos(data, word="picture"),
    "pixels": lambda data: write_photos(data, blue=100),
    "fewer": lambda data: (data / "Images" / "3.png").unlink(),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_images_and_captions_are_not_resumed(kind, tmp_path, capsys):
    data = write_photos(tmp_path / "data")
    command = f"contextclip --data {data} --batch-size 8 --steps 1 --out {tmp_path}"
    run(command)
    CHANGES[kind](data)
    line = refuse(capsys, f"{command} --resume")
    assert "clip.pt was made with other images or captions" in line


def test_a_run_is_never_overwritten(trained, capsys):
    before = (trained / "clip.pt").read_bytes()
    line = refuse(capsys, f"contextclip --out {trained} --lr 0.5")
    assert f"{trained / 'clip.pt'} is there: --resume goes on with it, or take another" in line
    assert (trained / "clip.pt").read_bytes() == before


def test_of_two_runs_at_the_same_time_one_is_refused_and_the_other_whole(
    tmp_path, capsys, monkeypatch
):
    command = f"contextclip --objective clip --out {tmp_path}"
    draw_batch = Cards.draw_batch

    def run_another_meanwhile(cards, settings):
        monkeypatch.setattr(Cards, "draw_batch", draw_batch)
        run(command)
        return draw_batch(cards, settings)

    monkeypatch.setattr(Cards, "draw_batch", run_another_meanwhile)
    assert "clip.pt is there" in refuse(capsys, command)
    assert cc.load(tmp_path / "clip.pt").finished
    assert [row["step"] for row in read_rows(tmp_path / "clip.csv")] == ["20", "40"]


def test_after_a_run_that_is_not_finite_a_lower_rate_needs_no_resume(tmp_path, capsys):
    command = f"contextclip --objective clip --steps 20 --out {tmp_path}"
    assert "not finite by step 20" in refuse(capsys, f"{command} --lr 1e9")
    run(command)
    assert cc.load(tmp_path / "clip.pt").finished


@pytest.mark.parametrize("objective", ["siglip", "siglixp"])
def test_post_training_starts_from_all_weights(objective, tmp_path):
    cc.train(small(objective), Noise(), tmp_path)
    base = cc.load(tmp_path / f"{objective}.pt").state_dict()
    settings = small("siglixp", init=str(tmp_path / f"{objective}.pt"))
    model, _, _ = cc.build_or_resume(settings, Noise(), tmp_path / "new.pt")
    for name in ("loss.log_tau", "loss.b"):
        assert base[name][0] != base[name][1]
        if objective == "siglip":  # it has not learned those of the context loss
            base[name][1] = base[name][0]
    assert_close(dict(model.state_dict()), dict(base), rtol=0, atol=0)


# ---- 6. Checkpoints ------------------------------------------------------------------------------
def write_checkpoint(path):
    model = new_model()
    cc.save(path, model, cc.make_optimizer(model), [{"step": 0}, {"step": 20}])


def fail_to_write(path, content):
    path.open("wb").write(content[:100])
    raise OSError(28, "No space left on device")


WRITERS = {
    "clip.pt": write_checkpoint,
    "fewshot.csv": lambda path: cc.write_csv(path, [{"task": "digits"}]),
    "curves.png": lambda path: fs.draw_curves(table_by_hand(), [4], path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_everything_as_it_was(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fail_to_write)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


FOREIGN = {
    "missing key": lambda saved: saved.pop("model"),
    "extra setting": lambda saved: saved["settings"].update(new=1),
    "other shapes": lambda saved: saved["model"].update({"loss.b": torch.zeros(3)}),
    "no log": lambda saved: saved.pop("log"),
    "empty log": lambda saved: saved["log"].clear(),
    "no optimizer": lambda saved: saved.pop("optimizer"),
}
READERS = [
    "fewshot --checkpoint clip.pt",
    "contextclip --out . --resume",
    "contextclip --out new --init clip.pt",
]


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("kind", ["not a file of torch", "cut file", *FOREIGN])
def test_a_checkpoint_of_another_kind_is_refused_in_one_line(
    kind, command, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content = (trained / "clip.pt").read_bytes()
    if kind in FOREIGN:
        saved = torch.load(io.BytesIO(content))
        FOREIGN[kind](saved)
        torch.save(saved, "clip.pt")
    else:
        Path("clip.pt").write_bytes(content[:9999] if kind == "cut file" else b"no")
    assert "clip.pt: no checkpoint of this version" in refuse(capsys, command)


# ---- 7. Cards ------------------------------------------------------------------------------------
def test_a_capital_and_its_small_letter_are_in_one_split(cards):
    splits = {}
    for name, split in zip(cards.names, cards.splits, strict=True):
        if re.fullmatch("latin (capital|small) letter [a-z] with .+", name):
            letter = re.sub("capital|small", "", name)
            assert splits.setdefault(letter, split) == split


def test_characters_train_or_validate(cards):
    assert {cards.splits[i] for i in cards.train} == {"train"}
    assert {cards.splits[i] for i in sum(cards.validation, [])} == {"validation"}
    assert len(cards.train) == 669
    assert [len(rows) for rows in cards.validation] == [76, 40, 40, 40]


def test_bitmaps_show_the_character_named_and_the_number(cards):
    path = f"{cc.get_data_path()}/fonts/ttf/{cc.FACES[13]}.ttf"
    font = ImageFont.truetype(path, 22, layout_engine=ImageFont.Layout.BASIC)
    arrow = cards.glyphs[cards.names.index("rightwards arrow"), 13]
    assert arrow.equal(cc.render("→", font, 32, 32, 23)[0])
    font = font.font_variant(size=12)
    assert cards.plates[37, 13].equal(cc.render("037", font, 9, 24, 9)[0])


@pytest.fixture
def unaltered(monkeypatch):
    """Cards are drawn as their glyphs are, without plates."""
    monkeypatch.setattr(cc, "lay_plates", lambda *_: None)
    monkeypatch.setattr(cc, "warp", lambda glyphs: glyphs)


def test_a_card_shows_its_character(cards, unaltered):
    rows = cards.train
    images = cc.draw_cards(cards, rows, rows, "train").flatten(1)
    images = F.normalize(images - images.mean(1, keepdim=True))
    glyphs = cards.glyphs[rows, FACE_SPLITS["train"]].float().flatten(2)
    glyphs = F.normalize(glyphs - glyphs.mean(2, keepdim=True), dim=2)
    similar = torch.einsum("bp,bfp->bf", images, glyphs).abs()  # half of them are inverted
    assert similar.amax(1).min() > 0.95


@pytest.mark.parametrize("split", FACE_SPLITS)
def test_cards_use_every_typeface_of_their_split_and_no_other(split, cards, unaltered):
    data = copy.copy(cards)
    data.glyphs = torch.zeros_like(cards.glyphs)
    for face in range(16):
        data.glyphs[:, face, face] = 255  # each has a row of pixels of its own
    rows = torch.full((400,), cards.characters.index("e"))
    images = cc.draw_cards(data, rows, rows, split)[:, 0, :, 0]
    lit = (images - images.median(1, keepdim=True).values).abs().argmax(1)
    assert lit.unique().tolist() == [*range(16)[FACE_SPLITS[split]]]


@pytest.mark.parametrize("split", FACE_SPLITS)
def test_plates_carry_the_number_and_lie_near_the_top_or_bottom(split, cards):
    images, numbers = torch.full((200, 1, 32, 32), 0.5), torch.arange(200, 400)
    zero, tops = torch.zeros(200, 1, 1), set()
    cc.lay_plates(images, cards, numbers, split, zero, zero + 1)
    for image, number in zip(images[:, 0], numbers, strict=True):
        top, left = (image != 0.5).nonzero()[0].tolist()
        plate = image[top : top + 9, left : left + 24]
        assert (cards.plates[number, FACE_SPLITS[split]] / 255 == plate).all((1, 2)).any()
        tops.add(top)
    assert tops == {0, 1, 2, 3, 20, 21, 22, 23}


def test_glyphs_are_turned_sheared_scaled_and_moved_as_documented(monkeypatch):
    def extreme(x, low, high):
        return torch.full((len(x), 1, 1), high)

    monkeypatch.setattr(cc, "uniform", extreme)
    cos, sin = math.cos(0.15), math.sin(0.15)
    move = 5 / 16  # by 5 pixels: from -1 to 1 are 32
    theta = torch.tensor([[cos, 0.2 - sin, move], [sin, cos, move]]) / 1.6
    images = torch.rand(1, 1, 32, 32)
    grid = F.affine_grid(theta[None], images.shape, align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    assert_close(cc.warp(images), expected, rtol=0, atol=1e-4)


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn since: characters, numbers, split, images."""
    calls, draw_cards = [], cc.draw_cards

    def watch(cards, characters, numbers, split):
        images = draw_cards(cards, characters, numbers, split)
        calls.append(Namespace(rows=characters, numbers=numbers, split=split, images=images))
        return images

    monkeypatch.setattr(cc, "draw_cards", watch)
    return calls


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_captions_name_the_character_and_the_number_drawn(share, cards, drawn):
    _, tokens = cards.draw_batch(Settings(batch_size=800, number_share=share))
    named = 0
    for row, i, number in zip(tokens.tolist(), drawn[0].rows, drawn[0].numbers, strict=True):
        name = cards.names[i]
        bare, both = cc.tokenize([name, f"{name} {cc.spell(number)}"], cards.vocabulary).tolist()
        row = row[: len(both)]
        assert row in (bare, both)
        named += row == both
    assert named / 800 == pytest.approx(share, abs=0.06)


def test_numbers_are_spelled_by_digit():
    assert cc.spell(71) == "number zero seven one"


@pytest.mark.parametrize("processes, B, most", [(1, 512, 1), (2, 1000, 1), (2, 1200, 2)])
def test_no_number_comes_twice_in_a_batch(processes, B, most, monkeypatch):
    monkeypatch.setattr(cc, "world_size", lambda: processes)
    numbers = []
    for rank in range(processes):
        monkeypatch.setattr(cc, "rank", lambda rank=rank: rank)
        numbers.append(cc.draw_different(1000, Settings(batch_size=B), "cpu"))
    counts = torch.cat(numbers).bincount()
    assert counts.sum() == B
    assert counts.max() == most


def test_validation_equals_a_plain_loop(cards, drawn):
    data, model = copy.copy(cards), new_model(cards.vocabulary)
    data.validation = [rows[:4] for rows in cards.validation[:2]]
    found = data.validate(model)
    assert drawn[0].split == "validation"
    assert drawn[0].rows.tolist() == 32 * sum(data.validation, [])
    x = F.normalize(model.encode_image(drawn[0].images)).view(32, 8, 16)
    classes = {f"{k}-shot": F.normalize(x[16 : 16 + k].mean(0)) for k in (1, 4, 16)}
    classes["zero-shot"] = cc.embed_classes(model, [[data.names[i]] for i in data.validation[0]])
    for name, means in classes.items():
        hits = [(means @ q).argmax() == c for c in range(len(means)) for q in x[:16, c]]
        assert found[name] == pytest.approx(100 * np.mean(hits), abs=1e-3)


# ---- 8. Captions and images of your own ----------------------------------------------------------
ANIMALS = ["dogs", "cats", "birds", "cows"]


def write_photos(folder, n=30, word="photo", blue=99):
    """n images of one colour each, with two captions each; every word comes often."""
    files = {f"Images/{i}.png": (8 * i, 240 - 8 * i, blue) for i in range(n)}
    rows = [f"{i}.png,a {w} of {ANIMALS[i % 4]}\n" for i in range(n) for w in (word, "view")]
    return write_files(folder, files | {"captions.txt": "image,caption\n" + "".join(rows)})


def photos_of(folder):
    return Photos(torch.device("cpu"), Settings(data=str(folder), batch_size=8))


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def photos(photos_folder):
    return photos_of(photos_folder)


TABLES = """captions.txt / Images / image,caption / {},{}
captions.txt / images / image_name,comment_number,comment / {},0,{}
results.csv / flickr30k_images / image_name| comment_number| comment / {}| 0| {}
train.tsv / . / filepath\ttitle / {}\t{}
metadata.csv / . / file_name,text / {},{}
table.csv / photos / \ufeffPATH;Split;Sentence / {};x;{}
table.csv / . / filename,image,caption / none.jpg,{},{}"""


@pytest.mark.parametrize("case", TABLES.splitlines())
def test_tables_of_many_formats_are_read(case, tmp_path):
    name, place, header, row = case.split(" / ")
    pairs = [("1.jpg", "a dog"), ("2.jpg", "a cat"), ("2.jpg", "cats")]
    lines = [header, *(row.format(*pair) for pair in pairs)]
    images = {f"{place}/1.jpg": "", f"{place}/2.jpg": ""}
    write_files(tmp_path, images | {name: "\r\n".join(lines)})
    found = cc.read_captions(tmp_path)
    assert [(path.name, text.strip()) for path, text in found if path.is_file()] == pairs


def test_quoted_cells_hold_delimiters_quotes_and_line_breaks(tmp_path):
    captions = ["cats", 'a "big" dog, asleep', "two\nlines", "long " * 30000]
    write_files(tmp_path, {"1.jpg": ""})
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["caption", "image"], *([text, "1.jpg"] for text in captions)])
        file.write('\n\na 5" screen,1.jpg')  # inches, after an empty line
    found = [caption for _, caption in cc.read_captions(tmp_path)]
    assert found == [*captions, 'a 5" screen']


@pytest.mark.parametrize("n, stray", [(3, [0, 2]), (30, [7, 20])])
def test_stray_quotes_swallow_no_rows(n, stray, tmp_path):
    rows = [f"{i}.png\tcaption {i}\n" for i in range(n)]
    for i in stray:
        rows[i] = rows[i].replace("caption", '"caption')
    images = {f"{i}.png": "" for i in range(n)}
    write_files(tmp_path, images | {"a.tsv": "image\tcaption\n" + "".join(rows)})
    found = [(path.name, text.strip()) for path, text in cc.read_captions(tmp_path)]
    assert found == [(f"{i}.png", f"caption {i}") for i in range(n)]


def test_pairs_of_image_and_text_are_read(tmp_path):
    files = {"a.txt": "a dog\nb\n", "sub/c.txt": "a bird\r\n", "README.txt": "no"}
    write_files(tmp_path, files | {"a.JPG": "", "sub/c.webp": ""})
    found = [(path.name, text.strip()) for path, text in cc.read_captions(tmp_path)]
    assert found == [("a.JPG", "a dog"), ("a.JPG", "b"), ("c.webp", "a bird")]


@pytest.mark.parametrize("place", ["._a", ".ipynb_checkpoints/a", "sub/.hidden/b/a"])
def test_hidden_pairs_are_not_read(place, tmp_path):
    write_files(tmp_path, {"b.jpg": "", "b.txt": "b", f"{place}.jpg": "", f"{place}.txt": "no"})
    assert cc.read_captions(tmp_path) == [(tmp_path / "b.jpg", "b")]


def test_hidden_tables_and_images_in_hidden_folders_are_not_read(tmp_path):
    files = {".ipynb_checkpoints/a.png": "", "sub/a.png": "", "._t.csv": "no"}
    write_files(tmp_path, files | {"t.csv": "image,caption\na.png,a"})
    assert cc.read_captions(tmp_path) == [(tmp_path / "sub" / "a.png", "a")]


USELESS = b"""none.png,a dog
0.png
1.png, .
broken.png,a cat
deep.png,a cow
,a
2.png,caf\xe9
2.png,last"""


def test_rows_of_no_use_are_left_out_and_counted(tmp_path, capsys):
    table = write_photos(tmp_path) / "captions.txt"
    write_files(tmp_path / "Images", {"broken.png": "no image"})
    Image.fromarray(np.full((8, 8), 9999, np.uint16)).save(tmp_path / "Images" / "deep.png")
    table.write_bytes(table.read_bytes() + USELESS)
    assert photos_of(tmp_path).counts.sum() == 2 * 30 + 1
    line = capsys.readouterr().out
    assert re.match("left out: 7 captions, the first that of .*none.png: no such file", line)


ROWS = [("0.png,🐕🐈", "no word"), ("0.png,a dog, asleep", "its cells do not fit the header")]


@pytest.mark.parametrize("row, problem", ROWS)
def test_a_row_of_no_use_is_told_what_is_wrong(row, problem, tmp_path, capsys):
    table = write_photos(tmp_path) / "captions.txt"
    table.write_text(table.read_text() + row, encoding="utf-8")
    photos_of(tmp_path)
    line = capsys.readouterr().out
    assert "left out: 1 captions, the first that of" in line
    assert problem in line


def write_pairs(folder, n):
    """n images, all named a.png, with their captions."""
    for i in range(n):
        write_files(folder / f"{i}", {"a.png": (9 * i, 0, 0), "a.txt": 5 * "word "})
    return folder


def test_a_tenth_is_held_out_by_chance_wherever_the_folder_lies(tmp_path):
    orders = []
    for place in ("a", "b/c"):
        data = photos_of(write_pairs(tmp_path / place, 20))
        assert data.n == 18
        orders.append((data.images[:, 0, 0, 0] // 9).tolist())
    assert orders[0] == orders[1] != [*range(20)]


def test_images_are_drawn_with_their_captions_and_once_in_a_batch(photos):
    own, drawn = photos.tokens.view(30, 2, -1).tolist(), set()
    shades = photos.images[:, 0, 0, 0].tolist()
    for _ in range(30):
        images, tokens = photos.draw_batch(Settings(batch_size=20))
        rows = [shades.index(shade) for shade in (255 * images[:, 0].amax((1, 2))).round()]
        assert len(set(rows)) == 20
        drawn |= {(i, own[i].index(row)) for i, row in zip(rows, tokens.tolist(), strict=True)}
    assert drawn == {(i, caption) for i in range(27) for caption in (0, 1)}  # none held out


def test_recall_equals_a_plain_loop_where_equal_captions_are_right(photos):
    data, model = copy.copy(photos), new_model(photos.vocabulary, data="x")
    data.n, data.counts = 6, torch.tensor(10 * [1, 2, 3])
    data.images = torch.randint(0, 256, (30, 3, 32, 32)).byte()
    data.tokens = torch.randint(2, 6, (60, 3))  # many are equal
    captions = data.tokens.tolist()
    owner = [i for i in range(30) for _ in range(data.counts[i])]
    cosines = model.encode_text(data.tokens) @ cc.embed_images(model, data.images[6:] / 255).T
    ranks = []
    for m in range(12, 60):  # those of the first six images are not held out
        right = {owner[k] for k in range(60) if captions[k] == captions[m]}
        order = cosines[m].argsort(descending=True) + 6
        ranks.append([i in right for i in order.tolist()].index(True))
    expected = {f"R@{k}": 100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)}
    assert data.validate(model) == pytest.approx(expected, abs=1e-3)


def test_of_ten_held_out_images_there_is_no_recall_at_10(photos):
    data = copy.copy(photos)
    data.n = 20
    assert data.validate(new_model(photos.vocabulary, data="x")).keys() == {"R@1", "R@5"}


def test_images_are_read_upright_and_in_colour(tmp_path):
    image, exif = Image.new("RGB", (32, 32), "blue"), Image.Exif()
    image.paste("red", (0, 0, 16, 32))  # the left half
    exif[274] = 6  # turned to the right by 90 degrees
    image.convert("CMYK").save(tmp_path / "turned.jpg", exif=exif)
    red, _, blue = cc.preprocess(Settings(data="x"))(Image.open(tmp_path / "turned.jpg"))
    assert (red - blue)[:12].min() > 0.5
    assert (blue - red)[20:].min() > 0.5


# ---- 9. The command line -------------------------------------------------------------------------
BAD = """contextclip --objective clop: it is one of clip, siglip, clixp, siglixp
contextclip --objective clip,: it is one of clip, siglip, clixp, siglixp
contextclip --alpha 1.5: --alpha 1.5: it is from 0 to 1
contextclip --alpha nan: --alpha nan: it is from 0 to 1
contextclip --number-share 7: --number-share 7.0: it is from 0 to 1
contextclip --lr -1: --lr -1.0: it is from 0 to
contextclip --weight-decay -1: --weight-decay -1.0: it is from 0 to
contextclip --tau-max 0: --tau-max 0.0: it is from 1 to
contextclip --batch-size 1: --batch-size 1: it is from 2 to 1e+06
contextclip --steps 0: --steps 0: it is from 1 to
contextclip --width 1: --width 1: it is from 2 to
contextclip --image-size 0: --image-size 0: it is from 1 to
contextclip --chunk -1: --chunk -1: it is from 0 to
contextclip --lr x: argument --lr: invalid float value: 'x'
contextclip --encoder resnet19: --encoder resnet19, --image-size 32: Unknown model
contextclip --encoder fcn_resnet50: --encoder fcn_resnet50, --image-size
contextclip --encoder alexnet: --encoder alexnet, --image-size
contextclip --data none: No such file or directory: 'none'
contextclip --data '': --data is empty
contextclip --data data/0: it takes one table (captions.txt, a .csv, a .tsv), there are 0
contextclip --data data/1: or pairs of an image and a .txt, there are none
contextclip --data data/2: its first line does not name an image and a caption
contextclip --data data/3: no row of its table fits the header
contextclip --data data/4: 0 images to train on are less than a batch
contextclip --out old --objective clip --resume --lr 0.5: clip.pt was made with {'lr': 0.002}
contextclip --out old --objective clip --resume --no-mask: was made with {'no_mask': False}
contextclip --out old --objective clip --resume --steps 41: was made with {'steps': 40}
contextclip --init none.pt: none.pt: no checkpoint of this version
contextclip --init words/clip.pt: --init: that model has other words
contextclip --init old/clip.pt --width 32: --init: that model has other words, or another encoder
contextclip --out words/clip.pt: File exists: 'words/clip.pt'
fewshot --out none: no checkpoint in none: python contextclip.py trains some
fewshot --checkpoint old/clip.pt words/clip.pt: models of other captions
fewshot --checkpoint old/clip.pt more/clixp.pt: these folders hold different objectives
fewshot --checkpoint old/clip.pt old/clip.pt: old has two models of clip
fewshot --out old --shots 0 1: 1 or more
fewshot --out old --plate: --plate is laid over the images of --data
fewshot --out old --data '': no such folder, nor a dataset of torchvision
fewshot --out old --data none: no such folder, nor a dataset of torchvision
fewshot --out old --data classes --shots 9: 'a' has 3 images
fewshot --out old --data classes --shots 1 --queries 1 --template photo: each --template has a {}
fewshot --out old --data one: name the folder that holds the class folders
fewshot --out old --data classes/a: name the folder that holds the class folders
fewshot --out old --data nested: nested/Testing holds no images: name the folder of the class
fewshot --out old --data broken: 0.png: cannot identify image file"""


BAD_FILES = {
    "data/0/train/metadata.csv": "",
    "data/1/0.png": "",
    "data/2/captions.txt": "image,title_id",
    "data/3/captions.txt": "image,caption\n0.png,a dog, asleep",
    "data/4/captions.txt": "image,caption\n0.png,🐕",
    "broken/a/0.png": "no image",
    "broken/b/0.png": "no image",
}


@pytest.fixture(scope="session")
def bad_files(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("old", "more", "words"):
        (folder / name).mkdir()
    shutil.copy(trained / "clip.pt", folder / "old")
    shutil.copy(trained / "clixp.pt", folder / "more")
    cc.train(small("clip"), Noise(), folder / "words")
    for part in ("classes", "nested/Training", "nested/Testing"):
        write_classes(folder / part, "ab", 3)
    write_classes(folder / "one", "a")
    return write_files(folder, BAD_FILES)


@pytest.mark.parametrize("case", BAD.splitlines())
def test_bad_input_is_one_line_and_exit_status_2(case, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    before = sorted(Path().rglob("*.*"))
    command, message = case.split(": ", 1)
    name, arguments = command.split(" ", 1)
    line = refuse(capsys, f"{name} --out new {arguments}")
    assert line.startswith(f"{name}: error: ")
    assert message in line
    assert sorted(Path().rglob("*.*")) == before


def test_a_batch_is_divided_evenly_between_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cc, "world_size", lambda: 3)
    line = refuse(capsys, f"contextclip --out {tmp_path}")
    assert "--batch-size 16: not a multiple of 3 processes" in line


@pytest.mark.parametrize("allocate", [torch.empty, bytearray])
def test_a_batch_that_no_memory_holds_is_one_line(allocate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Cards, "draw_batch", lambda cards, settings: allocate(10**15))
    assert "memory" in refuse(capsys, f"contextclip --out {tmp_path}")


STOPPED = [
    ("contextclip", Cards, "draw_batch", "stopped; the same command with --resume goes on\n"),
    ("fewshot", cc, "choose_device", "stopped\n"),
]


@pytest.mark.parametrize("name, owner, function, expected", STOPPED)
def test_only_training_is_resumed(name, owner, function, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(owner, function, interrupt)
    with pytest.raises(SystemExit, match="130"):
        run(f"{name} --out {tmp_path}")
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("optimize", [0, 2])  # 2: python -OO, which drops docstrings
def test_help_names_every_setting_and_its_default(optimize, capsys):
    source, script = (
        (HERE / "contextclip.py").read_text("utf-8"),
        {"__name__": "script", "__doc__": None},
    )
    exec(compile(source, "contextclip.py", "exec", optimize=optimize), script)
    with pytest.raises(SystemExit, match="0"):
        script["main"](["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, default in (asdict(Settings()) | {"objective": "clip,clixp"}).items():
        flag = name.replace("_", "-")
        assert re.search(rf"--{flag}( X)? \w((?! --).)+ \(default: {default}\)", text), name


def start_script(*command, **options):
    """python COMMAND in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **options)


@pytest.fixture(scope="session")
def redirected(tmp_path_factory):
    """`contextclip.py > file 2>&1` of images of which one has a name that is no UTF-8, and whose
    weights soon are not finite: what the file held while it ran, at the end, the exit status."""
    folder = tmp_path_factory.mktemp("redirected")
    data, log = write_pairs(folder / "data", 20), folder / "log"
    name = os.fsdecode(b"caf\xe9")
    write_files(data, {f"{name}.png": "no image", f"{name}.txt": "word"})
    command = [HERE / "contextclip.py", *FLAGS, "--data", data, "--steps", 200, "--lr", 1e9]
    with log.open("wb") as file:
        process = start_script(*command, "--out", folder, stdout=file, stderr=file)
        early = ""
        while process.poll() is None and "chance" not in early:
            time.sleep(0.01)
            early = log.read_text("utf-8")
        status = process.wait()
    return early, log.read_text("utf-8"), status


def test_redirected_lines_are_seen_while_it_runs(redirected):
    early, text, _ = redirected
    assert "is chance" in early
    assert len(early) < len(text)


def test_redirected_errors_come_after_what_was_printed_before(redirected):
    _, text, status = redirected
    assert status == 2
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == ["clip", "contextclip"]


def test_a_file_name_that_is_no_utf8_is_printed(redirected):
    _, text, _ = redirected
    assert re.match("left out: 1 captions, the first that of .*caf[?].png", text)


def test_torchrun_trains_one_model_in_two_processes(photos_folder, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [*torchrun, HERE / "contextclip.py", *FLAGS, "--data", photos_folder, "--steps", 2]
    process = start_script(*command, "--out", tmp_path, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=100)
    assert output.count("clixp: cpu") == 1  # one of them speaks
    assert cc.load(tmp_path / "clixp.pt").finished


# ---- fewshot.py: 1. Classifiers ------------------------------------------------------------------
def naive_zero_shot(q, X, labels, T, scale):
    return T @ q


def class_means(X, labels):
    return torch.stack([X[labels == c].mean(0) for c in range(4)])


def naive_prototypes(q, X, labels, T, scale):
    return F.normalize(class_means(X, labels)) @ q


def naive_tip(q, X, labels, T, scale, a, b, g=0.0):
    p = (T @ q / 0.1).softmax(0)
    KL = torch.stack([(p * (p / (T @ x / 0.1).softmax(0)).log()).sum() for x in X])
    low, high = (X @ q).aminmax()
    R = low + (high - low) * (KL.max() - KL) / (KL.max() - KL.min())
    scores = scale * T @ q
    for x, c, r in zip(X, labels, R, strict=True):
        scores[c] += a * torch.exp(-b * (1 - x @ q)) + g * r
    return scores


def naive_vote(q, X, labels, T, scale, k, weight):
    scores, cosines, k = torch.zeros(4).double(), X @ q, min(k, len(X))
    for rank, i in enumerate(cosines.argsort(descending=True)[:k]):
        weights = {"softmax": math.exp(cosines[i] / 0.07), "rank": 1 / (2 + rank)}
        scores[labels[i]] += weights.get(weight, 1 + (k - rank) / (k * (k + 1)))
    return scores


def naive_gda(q, X, labels, T, scale, shrink, trust=0.0):
    M = class_means(X, labels)
    S = sum(torch.outer(x - M[c], x - M[c]) for x, c in zip(X, labels, strict=True)) / len(X)
    S = (1 - shrink) * S + shrink * S.trace() / 6 * torch.eye(6)
    inverse = torch.linalg.inv(S)
    scores = [q @ inverse @ m - m @ inverse @ m / 2 for m in M]
    return torch.stack(scores) + trust * scale * T @ q


NAIVE = {
    "zero-shot": naive_zero_shot,
    "prototypes": naive_prototypes,
    "Tip-Adapter": naive_tip,
    "Tip-X": naive_tip,
    "plurality vote": naive_vote,
    "softmax vote": naive_vote,
    "rank vote": naive_vote,
    "GDA": naive_gda,
    "GDA + text": naive_gda,
}


def middle_of_grid(method):
    return {key: grid[len(grid) // 2] for key, grid in fs.CLASSIFIERS[method][1].items()}


def support(shots):
    """X, labels, Y, T, scale of four classes, rows in random order, d = 6."""
    labels = torch.randperm(4 * shots) % 4
    Y = F.one_hot(labels, 4).double()
    return units(4 * shots, 6), labels, Y, units(4, 6), torch.tensor(2.0).double()


@pytest.mark.parametrize("shots", [2, 5])
@pytest.mark.parametrize("method", NAIVE)
def test_classifiers_equal_their_formulas(method, shots):
    x, (X, labels, Y, T, scale) = units(7, 6), support(shots)
    hyper = middle_of_grid(method)
    found = fs.CLASSIFIERS[method][0](x, X, Y, T, scale, **hyper)
    expected = [NAIVE[method](q, X, labels, T, scale, **hyper) for q in x]
    assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_text_scale_is_tau_where_captions_are_right_and_0_where_wrong():
    e = torch.eye(2)
    assert fs.text_scale(e, e, e, 10.0) == 10
    assert fs.text_scale(e, e, e.flip(0), 10.0) == 0


# ---- fewshot.py: 2. Tasks ------------------------------------------------------------------------
def test_there_are_21_tasks_in_three_groups(cards):
    tasks = fs.card_tasks(cards)
    groups = [task.group for task in tasks]
    assert [groups.count(name) for name in ("seen", "combined", "unseen")] == [6, 2, 13]
    assert all(10 <= len(task.members) <= 40 for task in tasks)


def test_groups_share_no_character_and_only_seen_ones_were_trained(cards):
    groups = dict.fromkeys(sum(cards.validation, []), "validation")
    groups |= dict.fromkeys(cards.train.tolist(), "seen")
    for task in fs.card_tasks(cards):
        for i in task.members:
            assert groups.setdefault(i, task.group) == task.group
            if task.group == "combined":
                assert cards.vocabulary.keys() >= {*split_words(cards.names[i])}


@pytest.mark.parametrize("task", ["digits", "capitals + diacritic", "Hebrew"])
def test_only_unseen_characters_are_drawn_in_trained_typefaces(task, cards, drawn):
    (task,) = fs.card_tasks(cards, [task])
    task.draw(0, 1, 1)
    assert drawn[0].split == ("train" if task.group == "unseen" else "test")
    assert drawn[0].rows.tolist() == task.members


def arguments(**changes):
    given = {"out": Path("x"), "shots": [2], "queries": 3, "template": ["a {}", "{}!"]}
    return Namespace(**given | {"plate": False} | changes)


def own_task(folder, names):
    return fs.OwnTask(*fs.read_task(str(write_classes(folder, names)), arguments(), new_model()))


@pytest.mark.parametrize("kind", ["cards", "own"])
def test_supports_are_nested_and_queries_the_same_for_all_shots(kind, cards, tmp_path):
    task = own_task(tmp_path, "abc") if kind == "own" else fs.card_tasks(cards, ["digits"])[0]
    few, many = task.draw(0, 2, 3), task.draw(0, 4, 3)
    assert few.equal(many[: len(few)])
    assert len(many) == 7 * len(task.captions)
    assert len(many.flatten(1).unique(dim=0)) == len(many)
    assert not few.equal(task.draw(1, 2, 3))


def test_own_classes_take_turns_and_their_names_are_spoken_in_each_template(tmp_path):
    task = own_task(tmp_path, ["3", "red_fox", "0 - zero"])
    assert task.captions == [["a zero", "zero!"], ["a three", "three!"], ["a red fox", "red fox!"]]
    shades = (255 * task.draw(0, 4, 3)[:, 0, 0, 0]).round().view(7, 3)
    assert (shades % 20 == torch.tensor([10, 0, 5])).all()  # as they were written


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    write_classes(tmp_path, ["a", "b", ".ipynb_checkpoints"], 3)
    write_files(tmp_path, {"a/._0.png": "no", "a/notes.txt": "no"})
    images, labels, names = fs.read_class_folders(tmp_path, cc.preprocess(Settings()))
    assert images.shape == (6, 1, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert names == ["a", "b"]


def test_a_dataset_of_torchvision_is_read_by_name(monkeypatch):
    def dataset(folder, train, transform, download):
        assert download and not train
        data = torchvision.datasets.FakeData(14, (3, 16, 16), 2, transform)
        data.targets, data.classes = 7 * [0, 1], ["0 - zero", "1 - one"]
        return data

    monkeypatch.setattr(torchvision.datasets, "KMNIST", dataset)
    *_, images, _, captions = fs.read_task("KMNIST", arguments(), new_model())
    assert images.shape == (14, 1, 32, 32)
    assert captions == [["a zero", "zero!"], ["a one", "one!"]]


def test_a_folder_named_like_a_part_of_torchvision_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "mnist", "ab")
    _, _, images, *_ = fs.read_task("mnist", arguments(), new_model())
    assert len(images) == 20


def test_models_of_own_captions_choose_on_one_half_and_are_judged_on_the_other(photos, tmp_path):
    model, source = new_model(photos.vocabulary, data="x"), write_classes(tmp_path, "abc")
    halves = fs.make_tasks(arguments(data=[str(source)]), model, "cpu")
    images = torch.cat([task.draw(0, 2, 3) for (task,) in halves])
    assert images.shape == (30, 3, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 30


GROUPS = """unnamed / {} / 1 2 10 11
unnamed / a {} / n01440764 n02102040
unnamed / a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a {} / a b
own / {} / a b
own / a a a a {} / a b"""


@pytest.mark.parametrize("case", GROUPS.splitlines())
def test_classes_with_equal_captions_have_no_zero_shot(case, capsys):
    group, template, names = case.split(" / ")
    captions = [[template.replace("{}", name)] for name in names.split()]
    assert fs.find_group("x", captions, new_model()) == group
    said = "x: to the models some classes have the same caption: no zero-shot\n"
    assert (said in capsys.readouterr().out) == (group == "unnamed")


def test_captions_with_unknown_words_are_counted(capsys):
    fs.find_group("x", [["a b"], ["zebra"], ["a fox"]], new_model())
    assert "x: 3 classes, 2 of their captions have unknown words\n" in capsys.readouterr().out


def test_plates_are_laid_over_own_images_in_their_shades(tmp_path):
    for path in write_classes(tmp_path, "ab").glob("*/*"):
        image = Image.new("L", (32, 32), 200)
        image.putpixel((16, 16), 50)  # between the places of plates
        image.save(path)
    args = arguments(data=[str(tmp_path)], plate=True)
    ((task,), _) = fs.make_tasks(args, new_model(), "cpu")
    assert task.images.amin((1, 2, 3)).unique().tolist() == [50]
    assert (task.images < 150).sum((1, 2, 3)).min() > 20
    assert len(task.images.unique(dim=0)) > 15  # numbers differ


# ---- fewshot.py: 3. Evaluation -------------------------------------------------------------------
def episode_by_hand(**changes):
    """Two classes, e_0 and e_1 are their support and texts. Of four queries three are right."""
    e, one = torch.eye(2), torch.tensor
    given = {"x": e[[0, 0, 1, 1]], "y": one([0, 0, 0, 1]), "X": e, "Y": one([0, 1]), "T": e}
    return fs.Episode(**given | {"tau": 10.0} | changes)


def test_accuracy_by_hand_of_unbalanced_queries():
    assert fs.accuracy("prototypes", episode_by_hand()) == 75


@pytest.mark.parametrize("method", fs.CLASSIFIERS)
def test_accuracy_does_not_depend_on_the_order_of_rows(method):
    T = units(5, 8)
    y, Y = torch.arange(100) % 5, torch.arange(30) % 5
    x, X = F.normalize(T[y] + 0.8 * units(100, 8)), F.normalize(T[Y] + 0.8 * units(30, 8))
    a, b = torch.randperm(100), torch.randperm(30)
    hyper = middle_of_grid(method)
    found = fs.accuracy(method, fs.Episode(x, y, X, Y, T, 10.0), **hyper)
    assert 40 < found < 100
    assert fs.accuracy(method, fs.Episode(x[a], y[a], X[b], Y[b], T, 10.0), **hyper) == found


WRONG = [
    ("Y", [0, 0], "each class has support images"),
    ("y", [0, 0, 2, 1], "a label from 0 to 1"),
    ("y", [0, 0, 1], "each with a label"),
    ("T", 2 * [[0.0, 2.0]], "embeddings have length 1"),
    ("x", 4 * [[2.0, 0.0]], "embeddings have length 1"),
    ("X", [[1.0, 0.0], [0.0, 2.0]], "embeddings have length 1"),
    ("X", [[1.0, 0.0], [0.0, math.nan]], "embeddings have length 1"),
]


@pytest.mark.parametrize("name, value, message", WRONG)
def test_an_episode_that_is_none_is_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        fs.accuracy("prototypes", episode_by_hand(**{name: torch.tensor(value)}))


@pytest.mark.parametrize("shots, rows", [(1, [0, 1]), (2, [0, 1, 2, 3]), (0, [*range(6)])])
def test_with_shots_takes_the_first_of_each_class_in_any_order(shots, rows):
    X, Y = units(6, 2), torch.tensor([1, 0, 0, 1, 1, 0])
    episode = episode_by_hand(X=X, Y=Y).with_shots(shots)
    assert episode.X.equal(X[rows])
    assert episode.Y.equal(Y[rows])


def test_episodes_have_the_queries_first_and_then_the_support(cards):
    model = new_model(cards.vocabulary)
    (task,) = fs.card_tasks(cards, ["digits"])
    ((*_, episode),) = fs.episodes({"clixp": model}, [task], [3], 2, 4)
    x = cc.embed_images(model, task.draw(3, 2, 4))
    assert_close(torch.cat((episode.x, episode.X)), x)
    assert torch.cat((episode.y, episode.Y)).tolist() == 6 * [*range(10)]
    assert_close(episode.T, cc.embed_classes(model, task.captions))


# ---- fewshot.py: 4. Results ----------------------------------------------------------------------
@pytest.mark.parametrize("runs, expected", [(1, [[3.5, 5.5], [7.5, 9.5]]), (2, [[4.5, 8.5]])])
def test_of_one_run_its_draws_count_and_of_several_runs_their_means(runs, expected):
    rows = [
        {"model": "clip", "method": method, "shots": 1, "accuracy": value + i}
        for value in (1, 3, 5, 7)  # of two tasks or of two runs, two draws each
        for i, method in enumerate(fs.TRAINING_FREE)
    ]
    assert fs.tabulate(rows, [1], runs, 2)["clip"][fs.MEAN, 1].tolist() == expected


def test_the_interval_covers_the_mean_in_95_of_100_cases():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        values = rng.normal(size=(12, 12)) + rng.normal(size=(12, 1)) + rng.normal(size=12)
        mean, width = fs.interval(values)
        hits += abs(mean) <= width
    assert 364 <= hits <= 396


SIGNED = [
    ([[-0.04]], "0.0"),
    ([[0.0], [-0.001]], "0.0 ± 0.1"),
    ([[1.0, 3.0]], "+2.0 ± 12.7"),  # Student's 12.71 times 1
]


@pytest.mark.parametrize("values, expected", SIGNED)
def test_no_gain_is_printed_as_minus_zero_or_as_certain(values, expected):
    assert fs.signed(np.array(values)) == expected


EFFICIENCY = [
    ([50, 60, 70], [40, 45, 48], {1: "<1", 2: "<0.5", 4: "<0.25"}),
    ([10, 20, 40], [20, 30, 50], {1: "2", 2: "1.4", 4: ">1"}),
    ([80, 100, 100], [80, 100, 100], {1: "1", 2: "1"}),
]


@pytest.mark.parametrize("base, context, expected", EFFICIENCY)
def test_sample_efficiency_by_hand(base, context, expected):
    assert fs.efficiency(base, context, [1, 2, 4]) == expected


def table_by_hand():
    base = np.array([[1.0, 2.0], [5.0, 6.0], [1.0, 2.0]])
    values = {"siglip": base, "siglixp": base + [[2], [-1], [2]]}
    return {name: {(fs.MEAN, 4): v, ("zero-shot", 0): v[:2]} for name, v in values.items()}


def test_the_report_is_of_context_less_base(capsys):
    fs.report(table_by_hand(), [4])
    text = " ".join(capsys.readouterr().out.split())
    assert "siglip 4-shot mean of the six 2.8 zero-shot, 2 tasks: 3.5" in text
    assert "siglixp - siglip 4-shot mean of the six +1.0 ± 4.3 zero-shot, 2 tasks: +0.5" in text
    assert text.endswith("tasks that gain, of 3: 2 sample efficiency: 4-shot >1")


@pytest.mark.filterwarnings("error")
def test_curves_of_one_model_are_drawn_without_a_warning(tmp_path):
    table = table_by_hand()
    table.pop("siglixp")
    fs.draw_curves(table, [4], tmp_path / "curves.png")
    Image.open(tmp_path / "curves.png").verify()


# ---- fewshot.py: 5. The command line -------------------------------------------------------------
def evaluate(trained, out, given):
    """A short evaluation of trained models -> the rows of fewshot.csv."""
    models = f"{trained / 'clip.pt'} {trained / 'clixp.pt'}"
    run(f"fewshot --checkpoint {models} --shots 1 2 --seeds 2 --queries 2 --out {out} {given}")
    return read_rows(out / "fewshot.csv")


def test_a_small_evaluation_from_end_to_end(trained, tmp_path, capsys):
    rows = evaluate(trained, tmp_path, "--tasks digits Hebrew --methods 'GDA + text'")
    # models, draws, (tasks, methods, shots, zero-shot of one task)
    assert len(rows) == 2 * 2 * (2 * 7 * 2 + 1)
    assert {row["task"] for row in rows if row["method"] == "zero-shot"} == {"digits"}
    assert "clixp - clip" in capsys.readouterr().out
    Image.open(tmp_path / "accuracy_vs_shots.png").verify()


@pytest.mark.parametrize("names", [("base.pt", "clixp (1).pt"), ("clixp.pt", "clip.pt")])
def test_models_are_paired_by_objective_whatever_their_names(names, trained, tmp_path):
    for objective, name in zip(["clip", "clixp"], names, strict=True):
        shutil.copy(trained / f"{objective}.pt", tmp_path / name)
    (models,) = fs.load_runs([*tmp_path.iterdir()], "cpu")
    assert len(models) == 2
    assert all(model.settings.objective == name for name, model in models.items())


def test_results_are_printed_even_when_they_cannot_be_written(trained, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate(trained, trained / "clip.pt" / "out", "--tasks digits --methods")
    assert "sample efficiency:" in capsys.readouterr().out


def test_an_ascii_terminal_does_not_stop_the_report(trained, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    evaluate(trained, tmp_path, "--tasks digits Greek --methods")
    terminal.seek(0)
    assert re.search(r"\d \? \d", terminal.read())


@pytest.mark.parametrize("name, written", [("日本", "日本"), (os.fsdecode(b"caf\xe9"), "caf?")])
def test_a_name_that_is_not_ascii_or_utf8_is_written_whole(name, written, trained, tmp_path):
    data = write_classes(tmp_path / name, ["a", name], 4)
    rows = evaluate(trained, tmp_path / "out", f"--data {data} --methods")
    assert {Path(row["task"]).name for row in rows} == {written}
    assert len([row for row in rows if row["method"] == "prototypes"]) == 2 * 2 * 2


# ---- README.md -----------------------------------------------------------------------------------
def block_of_the_readme(text):
    """The block of Python in README.md, or in that of figures/, that has this text."""
    texts = [(HERE / name).read_text("utf-8") for name in ("README.md", "figures/README.md")]
    blocks = re.findall("```python\n(.*?)```", "".join(texts), re.DOTALL)
    (found,) = [block for block in blocks if text in block]
    return found


@pytest.mark.parametrize("text, result", [("LIxPLoss(", "loss"), ("Episode(", "episode")])
def test_code_in_the_readme_runs_as_it_stands(text, result):
    encode = nn.Linear(8, 512)
    names = episode_by_hand()._asdict() | {
        "model": Namespace(encode_image=encode, encode_text=encode),
        "images": torch.randn(4, 8),
        "captions": torch.randn(4, 8),
        "optimizer": torch.optim.SGD(encode.parameters(), 0.1),
    }
    exec(block_of_the_readme(text), names)
    assert result in names


COCO = r"""{"images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
"annotations": [{"image_id": 7, "caption": "a \"big\" dog, asleep"},
{"image_id": 8, "caption": "a cat"}, {"image_id": 8, "caption": "cats"}]}"""


def test_the_recipe_of_the_readme_turns_coco_into_a_table(tmp_path, monkeypatch):
    files = {"annotations/captions_train2017.json": COCO, "train2017/1.jpg": ""}
    monkeypatch.chdir(write_files(tmp_path, files | {"train2017/2.jpg": ""}))
    exec(block_of_the_readme("import csv, json"), {})
    found = [(path.name, text) for path, text in cc.read_captions(Path("captions.csv"))]
    assert found == [("1.jpg", 'a "big" dog, asleep'), ("2.jpg", "a cat"), ("2.jpg", "cats")]
