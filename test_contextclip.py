"""Tests of contextclip.py and fewshot.py: `python -m pytest`. Offline, on the CPU, few minutes."""

import copy
import csv
import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize

import contextclip as cc
import fewshot as fs

SMALL = "--steps 40 --batch-size 16 --width 16 --characters 60 --precision float32 --device cpu"
SMALL = SMALL.split()
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cards():
    """Cards of few characters; the typefaces are drawn once for all tests."""
    drawn = cc.draw_typefaces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cc, "draw_typefaces", lambda: drawn)
        patch.setattr("torch.hub.download_url_to_file", None)  # offline
        yield cc.Cards("cpu", cc.Settings(characters=60))


def make_model(**settings):
    torch.manual_seed(0)
    settings = {"width": 16, "batch_size": 8, "precision": "float32"} | settings
    return cc.ContextCLIP(cc.Settings(**settings), cc.build_vocabulary(["a b c d"]))


def train(source, out, objective="clixp", **changes):
    extra = {n: changes.pop(n) for n in ("resume", "init", "watch") if n in changes}
    small = {"steps": 40, "batch_size": 16, "width": 16, "precision": "float32"}
    out.mkdir(parents=True, exist_ok=True)
    return cc.train(cc.Settings(objective, **(small | changes)), source, out, **extra)


def run(*command):
    """python COMMAND in a process of its own, which finds contextclip."""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(cc.__file__), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **options)


def refuse(capsys, *arguments, program="contextclip"):
    """The one line with which the command ends, with exit status 2."""
    main = fs.main if program == "fewshot" else lambda given: cc.main([*SMALL, *given])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{program}: "), lines
    return lines[0]


def equal_runs(*paths):
    a, b = (cc.read_checkpoint(path) for path in paths)
    exact(*([run["model"], run["log"], run["optimizer"]["state"]] for run in (a, b)))


def naive_units(rows):
    return [row / row.square().sum().sqrt() for row in rows]


def naive_logits(x, t, tau, b):
    return [[tau * (row * column).sum() + b for column in t] for row in x], range(len(x))


def naive_clip(x, t, tau, b):
    s, B = naive_logits(x, t, tau, 0)
    rows = [sum(s[i][j].exp() for j in B).log() for i in B]
    columns = [sum(s[j][i].exp() for j in B).log() for i in B]
    return torch.stack([(rows[i] + columns[i]) / 2 - s[i][i] for i in B])


def naive_siglip(x, t, tau, b):
    s, B = naive_logits(x, t, tau, b)
    term = [[(1 + (-s[i][j] if i == j else s[i][j]).exp()).log() for j in B] for i in B]
    return torch.stack([sum(row) for row in term])


def naive_context(x, values, tau_ctx, mask=True):
    rows = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i or not mask]
        weights = [((x[i] * x[j]).sum() / (tau_ctx * len(x[i]) ** 0.5)).exp() for j in others]
        rows.append(sum(w * values[j] for w, j in zip(weights, others, strict=True)) / sum(weights))
    return torch.stack(rows)


def naive_lixp(v, t, model, settings):
    loss = naive_siglip if settings.objective.startswith("sig") else naive_clip
    x, y, taus = naive_units(v), naive_units(t), model.log_tau.exp()
    plain = loss(x, y, taus[0], model.b[0]).mean()
    if settings.objective in ("clip", "siglip"):
        return torch.stack([plain, plain, 0 * plain])
    values = x if settings.normalize_values else v
    values = [value.detach() if settings.detach_values else value for value in values]
    x_ctx = naive_units(naive_context(x, values, taus[2], not settings.no_mask))
    own = 0 if settings.shared_temperature else 1
    context = loss(x_ctx, y, taus[own], model.b[own]).mean()
    return torch.stack([settings.alpha * plain + (1 - settings.alpha) * context, plain, context])


def embeddings(B, d=16):
    """v, t (B, d) float64, not normalised, with gradients."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, d, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]


def random_model(**settings):
    model = make_model(**settings).double()  # five different numbers, so that a mix-up shows
    model.log_tau.data[:] = torch.tensor([1.0, 1.5, -3.0])
    model.b.data[:] = torch.tensor([-1.0, -2.0])
    return model


def same(actual, expected, inputs):
    """Equal values, and equal gradients of a fixed random projection."""
    weights = torch.linspace(1, 2, expected.numel()).double().sin().view(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    options = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    a, b = (torch.autograd.grad((y * weights).sum(), inputs, **options) for y in (actual, expected))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("B", [2, 3, 8, 17])
@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_objectives_equal_naive_loops_also_in_blocks_and_with_every_switch(objective, B):
    (v, t), model = embeddings(B), random_model(objective=objective)
    switches = ["no_mask", "shared_temperature", "detach_values", "normalize_values"]
    for switch in [None, *switches] if objective.endswith("xp") else [None]:
        changes = {switch: True} if switch else {}
        settings = cc.Settings(objective, batch_size=B, alpha=0.7, **changes)
        expected = naive_lixp(v, t, model, settings)
        for settings.chunk in (0, 1, 5, 100):
            losses = cc.lixp_loss(v, t, model.temperatures(), settings)
            same(losses, expected, [v, t, model.log_tau, model.b])


def test_rows_at_hand_are_a_part_of_the_batch_and_an_image_not_of_its_own_context():
    (v, t), i = embeddings(8), torch.tensor([7, 0])
    X, T = F.normalize(v, dim=1), F.normalize(t, dim=1)
    tau, b = torch.tensor(3.0).double().requires_grad_(), torch.tensor(-2.0).double()
    for loss, naive in ((cc.clip_loss, naive_clip), (cc.siglip_loss, naive_siglip)):
        same(loss(X[i], T[i], i, X, T, tau, b), naive(X, T, tau, b)[i], [v, t, tau])
    for mask in (True, False):
        weights = naive_context(X, torch.eye(8).double(), tau, mask)
        assert (weights.diagonal().max() == 0) == mask
        same(cc.attention(X[i], i, X, tau, mask), weights[i], [v, tau])
        same(cc.contextualize(X[i], i, X, v, tau, mask), (weights @ v)[i], [v, tau])


def test_the_order_of_the_batch_does_not_matter():
    (v, t), i, p = embeddings(9), torch.arange(9), torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])
    x = F.normalize(v, dim=1)
    permuted = cc.contextualize(x[p], i, x[p], v[p], 0.1)
    torch.testing.assert_close(permuted, cc.contextualize(x, i, x, v, 0.1)[p])
    for model in (random_model(objective=objective) for objective in cc.OBJECTIVES):
        loss = partial(cc.lixp_loss, temperatures=model.temperatures(), settings=model.settings)
        losses = [loss(v[order], t[order]) for order in (i, p)]
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_losses_are_finite_at_the_highest_temperature_and_keep_no_matrix_in_blocks(objective):
    v, t = (1e3 * e.detach().float().requires_grad_() for e in embeddings(256))
    model, kept = make_model(objective=objective, tau=100, tau_ctx=0.02), []
    for chunk in (0, 32):
        sizes, settings = {}, cc.Settings(objective, chunk=chunk)
        keep = partial(lambda s, x: s.update({x.untyped_storage().data_ptr(): x}) or x, sizes)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = cc.lixp_loss(v, v.detach() + t, model.temperatures(), settings)
        gradients = torch.autograd.grad(losses[0], [v, t, model.log_tau, model.b])
        assert losses.isfinite().all() and all(g.isfinite().all() for g in gradients)
        kept.append(sum(x.numel() for x in sizes.values()) / 256**2)
    assert kept[0] > 1 and kept[1] < 0.8, kept


def test_losses_are_float32_while_the_encoder_runs_in_bf16(monkeypatch):
    cast = partial(torch.is_autocast_enabled, "cpu")
    monkeypatch.setattr(cc, "lixp_loss", lambda v, t, *_: (v, t, cast()))
    images, tokens = torch.rand(4, 1, 32, 32), torch.full((4, 3), 2)
    found = [make_model(precision=p)(images, tokens) for p in ("bf16", "float32")]
    assert all(v.dtype == t.dtype == torch.float32 and not cast for v, t, cast in found)
    half, full = found[0][0], found[1][0]
    assert not torch.equal(half, full) and torch.allclose(half, full, atol=0.1)


PROCESS = """
import sys, torch, contextclip as cc
from torch import distributed as dist
if cc.PROCESSES > 1:
    store = dist.FileStore(sys.argv[1] + ".store", 2)
    dist.init_process_group("gloo", store=store, rank=cc.RANK, world_size=2)
found = {}
for objective in ("clip", "siglip", "clixp", "siglixp"):
    for chunk in (0, 3):
        torch.manual_seed(0)
        settings = cc.Settings(objective, batch_size=16, width=16, chunk=chunk, precision="float32")
        model = cc.ContextCLIP(settings, cc.build_vocabulary(["a b c d"]))
        batch = torch.rand(16, 1, 32, 32), torch.randint(2, 6, (16, 5))
        forward = cc.DistributedDataParallel(model) if cc.PROCESSES > 1 else model
        losses = forward(*(part.chunk(cc.PROCESSES)[cc.RANK] for part in batch))
        losses[0].backward()
        losses = cc.add_up(losses.detach()) / cc.PROCESSES
        found[f"{objective} {chunk}"] = losses, {n: p.grad for n, p in model.named_parameters()}
if cc.RANK == 0:
    torch.save(found, sys.argv[1])
if cc.PROCESSES > 1:
    dist.barrier()
    dist.destroy_process_group()
    draw, cc.SAVE_EVERY = cc.Cards.draw_batch, 10
    def draw_batch(self, settings, step):
        assert cc.RANK == 0 or settings.objective == "clip" or step < 25, "one dies"
        return draw(self, settings, step)
    cc.Cards.draw_batch = draw_batch
    cc.main(sys.argv[2:])
"""


def test_two_processes_compute_what_one_does_which_goes_on_when_one_dies(tmp_path, monkeypatch):
    write_files(tmp_path, {"process.py": PROCESS})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*SMALL, "--out", str(tmp_path / "out")]
    two = run(*torchrun, tmp_path / "process.py", tmp_path / "2.pt", *arguments)
    output, errors = two.communicate(timeout=120)
    assert two.returncode != 0 and "one dies" in errors and output.count("clip: cpu") == 1
    monkeypatch.setattr(sys, "argv", ["process.py", str(tmp_path / "1.pt")])
    exec(PROCESS, {})
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert len(one) == 8 and one["clip 0"][1]["image_encoder.0.weight"].abs().max() > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
    paths = [tmp_path / "out" / name for name in ("clip.pt", "clixp.pt")]
    assert sorted((tmp_path / "out").glob("c*.pt")) == paths
    clip, clixp = map(cc.read_checkpoint, paths)
    assert clip["log"][-1][0] == 40 and clixp["log"][-1][0] == 20
    cc.main([*arguments, "--resume"])
    assert cc.read_checkpoint(paths[0])["result"] == clip["result"]
    log = cc.read_checkpoint(paths[1])["log"]
    assert log[:2] == clixp["log"] and log[-1][0] == 40


def test_a_batch_follows_from_seed_step_and_process_alone(cards, monkeypatch):
    def draw(objective="clip", seed=0, step=1, rank=0):
        monkeypatch.setattr(cc, "RANK", rank)
        torch.rand(1)
        settings = cc.Settings(objective, seed=seed, batch_size=16)
        cc.seed_step(settings, step)
        return cards.draw_batch(settings, step)

    exact(draw(), draw("siglixp"))
    others = [draw(), draw(seed=1), draw(step=2), draw(rank=1), draw(seed=1, step=0)]
    assert len(torch.stack([images for images, _ in others]).unique(dim=0)) == 5


def test_splits_are_disjoint_and_validation_has_trained_words_alone(cards):
    assert [face for group in cc.FACE_SPLITS.values() for face in cc.FACES[group]] == cc.FACES
    assert ["STIX" in face for face in cc.FACES] == 12 * [False] + 4 * [True]
    names, sides = cards.names, {}
    splits = [cc.split_of(c, name) for c, name in zip(cards.index, names, strict=True)]
    for name, split in zip(names, splits, strict=True):
        letter = re.sub("capital|small", "", name) if " with " in name else name
        assert sides.setdefault(letter, split) == split  # a capital with its small letter
        assert split == "test" or not re.match("cyrillic|hebrew|arabic|lao|lisu|braille", name)
    combinations = [split for name, split in sides.items() if re.match("latin .* with ", name)]
    assert all(combinations.count(s) > 10 for s in ("train", "combinations", "test"))
    for data in (cards, *(cc.Cards("cpu", cc.Settings(characters=n)) for n in (0, 300))):
        for split, members in (data.validation | {"train": data.train}).items():
            assert {splits[i] for i in members} <= {split}
        trained = {word for i in data.train for word in cc.split_words(names[i])}
        new = {w for i in data.validation.get("combinations", []) for w in cc.split_words(names[i])}
        assert new <= trained and cc.build_vocabulary(trained).keys() <= data.vocabulary.keys()
    sizes = [len(data.validation[split]) for split in ("combinations", "phonetic letters")]
    assert len(data.train) == 300 and sizes[0] > 5 and sizes[1] == 40


def test_a_card_shows_the_character_named(cards, monkeypatch):
    names = {"A": "latin capital letter a", "7": "digit seven", "→": "rightwards arrow"}
    for (character, name), face in zip(names.items(), (0, 8, 13), strict=True):
        path = f"{cc.get_data_path()}/fonts/ttf/{cc.FACES[face]}.ttf"
        canvas, font = Image.new("L", (90, 90)), ImageFont.truetype(path, 22)
        ImageDraw.Draw(canvas).text((30, 30), character, fill=255, font=font)
        glyph = Image.fromarray(cards.glyphs[cards.index[character], face].numpy())
        a, b = (np.array(image.crop(image.getbbox())) for image in (canvas, glyph))
        assert a.shape == b.shape and np.abs(a - b.astype(int)).mean() < 2
        assert cards.names[cards.index[character]] == name
    for name in ("lay_plates", "warp"):
        monkeypatch.setattr(cc, name, lambda images, *_: images)
    images, _ = cc.draw_cards(cards, cards.train, "train")
    glyphs = cards.glyphs[cards.train, cc.FACE_SPLITS["train"]].float().flatten(2)
    x, g = (F.normalize(e - e.mean(-1, True), dim=-1) for e in (images.flatten(1), glyphs))
    found = torch.einsum("bp,cfp->bcf", x, g).abs().amax(2).argmax(1)
    assert (found == torch.arange(60)).float().mean() > 0.9  # some look alike


def test_the_number_on_the_plate_is_the_one_returned(cards, monkeypatch):
    monkeypatch.setattr(cc, "warp", torch.zeros_like)
    torch.manual_seed(0)
    images, numbers = cc.draw_cards(cards, cards.train.repeat(5), "train")
    ink = (images - images.flatten(1).median(1).values[:, None, None, None]).abs()[:, 0]
    ink = (ink / ink.amax((1, 2), True)).unfold(1, 9, 1).unfold(2, 24, 1)
    rows = [0, 1, 2, 3, 20, 21, 22, 23]
    places = ink[:, rows, :9].unflatten(4, (3, 8)).transpose(3, 4).flatten(4)  # (B, 8, 9, 3, 72)
    digits = cards.digits[:, cc.FACE_SPLITS["train"]].flatten(2) / 255  # (10, 10, 72)
    scores = 2 * torch.einsum("brcnp,dfp->brcfnd", places, digits)
    best, decoded = (scores - digits.square().sum(2).T[:, None]).max(-1)
    at = best.sum(-1).flatten(1).argmax(1)  # place and typeface
    found = decoded.flatten(1, 3)[torch.arange(300), at]
    assert (found == numbers).float().mean() > 0.98 and len(numbers.unique(dim=0)) > 200
    assert len((at // 90).unique()) == 8 and len((at // 10 % 9).unique()) == 9


def test_glyphs_are_turned_sheared_scaled_moved_and_bent(monkeypatch):
    drawn, uniform = [], cc.uniform

    def note(low, high, *shape, device):
        drawn.append((low, high, uniform(low, high, *shape, device=device)))
        return drawn[-1][2]

    monkeypatch.setattr(cc, "uniform", note)
    images = torch.rand(64, 1, 32, 32)
    warped, scales = cc.warp(images), drawn[2]
    assert [high for _, high, _ in drawn] == [0.15, 0.2, 1.6, 1, 10, 10] and scales[0] == 0.8
    assert all(low == -high for low, high, _ in drawn[:2] + drawn[3:])
    angle, k, scale, bend, right, down = (values.squeeze() for *_, values in drawn)
    c, s, right, down = angle.cos(), angle.sin(), right / 32, down / 32
    rows = torch.stack((c, k - s, c * right + (k - s) * down, s, c, s * right + c * down), 1)
    grid = F.affine_grid(rows.view(-1, 2, 3) / scale[:, None, None], images.shape, False)
    bent = F.interpolate(bend / 32, 32, mode="bilinear", align_corners=True)
    expected = F.grid_sample(images, grid + bent.permute(0, 2, 3, 1), align_corners=False)
    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("group", cc.FACE_SPLITS)
@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_cards_use_every_typeface_of_their_group_and_no_other(cards, group, name, monkeypatch):
    monkeypatch.setattr(cc, "warp", lambda images: images)
    group_faces = range(16)[cc.FACE_SPLITS[group]]
    blank = {n: torch.zeros_like(getattr(cards, n)) for n in ("digits", "glyphs")}
    for faces in ([f for f in range(16) if f not in group_faces], *([f] for f in group_faces)):
        bitmaps = blank[name].clone()
        bitmaps[..., faces, :, 4:12] = 255  # a bar; else nothing is drawn
        torch.manual_seed(0)
        data = copy.copy(cards)
        data.__dict__.update(blank | {name: bitmaps})
        images, _ = cc.draw_cards(data, torch.full((400,), cards.index["e"]), group)
        share = ((images.amax((1, 2, 3)) - images.amin((1, 2, 3))) > 0.25).float().mean().item()
        expected = 1 / len(group_faces) if faces[0] in group_faces else 0
        assert share == pytest.approx(expected, abs=0.1 * (expected > 0))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_captions_name_the_character_and_the_number_drawn(share, monkeypatch):
    cards = cc.Cards("cpu", cc.Settings(characters=60, number_share=share))
    drawn, draw = [], cc.draw_cards
    monkeypatch.setattr(cc, "draw_cards", lambda *a: drawn.append((a, draw(*a))) or drawn[-1][1])
    torch.manual_seed(0)
    _, tokens = cards.draw_batch(cc.Settings(batch_size=400), 1)
    ((_, characters, group), (_, numbers)), words, named = drawn[0], list(cards.vocabulary), 0
    assert group == "train" and set(characters.tolist()) == set(cards.train.tolist())
    for row, i, number in zip(tokens.tolist(), characters, numbers, strict=True):
        caption = " ".join(words[token] for token in row).replace(" <pad>", "")
        name = " ".join(cc.split_words(cards.names[i]))
        full = " ".join([name, "number", *(cc.NUMERALS[d] for d in number)])
        assert caption in {0: [name], 1: [full]}.get(share, [name, full])
        named += caption == full
    assert named / 400 == pytest.approx(share, abs=0.08)


def test_validation_is_deterministic_and_its_supports_are_nested(cards, monkeypatch):
    drawn, draw = [], cc.draw_cards
    monkeypatch.setattr(cc, "draw_cards", lambda *a: drawn.append(a) or draw(*a))
    model = cc.ContextCLIP(cc.Settings(width=16), cards.vocabulary).eval()
    one, two = cards.validate(model, (1, 4)), cards.validate(model, (2, 4))
    assert one["4-shot"] == two["4-shot"] and cards.validate(model, (1, 4)) == one
    assert {a[2] for a in drawn} == {"validation"} and one["1-shot"] != one["4-shot"]


def test_captions_become_words_and_words_tokens():
    words = {"A  Dog's ball, red-blue!": "a dog s ball red-blue", "日本語 ok": "日 本 語 ok"}
    words |= {"ひらが": "ひ ら が", "สวัส": "ส ว ั ส", "हिन्दी भाषा": "हिन्दी भाषा", "…": ""}
    words |= {"Cafe\u0301": "caf\u00e9", "Straße 12": "straße 12", "привет, мир": "привет мир"}
    assert {caption: " ".join(cc.split_words(caption)) for caption in words} == words
    vocabulary = cc.build_vocabulary(["b a", "b caf\u00e9"])
    assert vocabulary == {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3, "caf\u00e9": 4}
    assert cc.build_vocabulary(["b a", "b b"], least=2).keys() == {"<pad>", "<unk>", "b"}
    tokens = cc.tokenize(["A zzz B", "", "cafe\u0301"], vocabulary)
    assert tokens.tolist() == [[2, 1, 3], [1, 0, 0], [4, 0, 0]] and tokens.dtype == torch.int64
    assert cc.tokenize(["a " * 99], vocabulary).shape == (1, cc.MAX_WORDS)


@pytest.mark.parametrize("objective", cc.OBJECTIVES)
def test_a_short_run_lowers_the_loss_and_writes_its_log(cards, tmp_path, objective, monkeypatch):
    torch.manual_seed(0)
    batch = cards.draw_batch(cc.Settings(batch_size=16), 1)
    monkeypatch.setattr(cc.Cards, "draw_batch", lambda *_: batch)
    result = train(cards, tmp_path, objective, steps=60, lr=5e-3)
    header, *log = [line.split(",") for line in (tmp_path / f"{objective}.csv").read_text().split()]
    assert header == cc.COLUMNS and [int(row[0]) for row in log] == list(range(10, 61, 10))
    loss, plain, context = np.array(log, float)[:, 1:4].T
    assert plain[0] < 5 and plain[-1] < 0.5 * plain[0] and loss[-1] < 0.5 * loss[0]
    assert 0 < context[-1] < context[0] if objective.endswith("xp") else not context.any()
    assert result["loss"] == float(log[-1][1])
    groups = cc.read_checkpoint(tmp_path / f"{objective}.pt")["optimizer"]["param_groups"]
    assert groups[0]["lr"] == cc.learning_rate(60, cc.Settings(steps=60, lr=5e-3))


def test_alpha_one_is_the_base_run_bit_for_bit(cards, tmp_path):
    train(cards, tmp_path, "clip")
    train(cards, tmp_path, "clixp", alpha=1.0)
    a, b = (cc.read_checkpoint(tmp_path / f"{name}.pt")["model"] for name in ("clip", "clixp"))
    exact(a, b)  # so both have seen the same batches, too
    assert a["log_tau"][0] != a["log_tau"][1] == make_model().log_tau[1]


@pytest.mark.parametrize("encoder, n", [("cnn", 10), ("mobilenet_v3_small", 1)])
def test_an_interrupted_and_resumed_run_is_the_whole_one(cards, tmp_path, monkeypatch, encoder, n):
    monkeypatch.setattr(cc, "LOG_EVERY", n)
    monkeypatch.setattr(cc, "SAVE_EVERY", n)
    monkeypatch.setattr(cc.Cards, "validate", lambda *_: {"time": time.time()})
    paths = [tmp_path / name / "clixp.pt" for name in ("whole", "parts")]
    go_on = partial(train, cards, tmp_path / "parts", encoder=encoder)  # mobilenet has dropout
    train(cards, tmp_path / "whole", encoder=encoder, steps=4 * n)
    with pytest.raises(ZeroDivisionError):
        go_on(watch=lambda step, _: 1 / (step - 3 * n), steps=4 * n)
    assert cc.read_checkpoint(paths[1])["log"][-1][0] == 2 * n
    result = go_on(resume=True, steps=4 * n)
    equal_runs(*paths)
    assert go_on(resume=True, steps=4 * n) == result  # it is finished
    go_on(resume=True, steps=5 * n)
    log = cc.read_checkpoint(paths[1])["log"]
    assert [row[0] for row in log] == [n, 2 * n, 3 * n, 4 * n, 5 * n]
    for name, new in {"lr": 0.01, "seed": 1, "width": 24, "no_mask": True, "steps": n}.items():
        with pytest.raises(cc.UserError, match=f"was made with {name} .+, not {new}"):
            go_on(resume=True, **{"steps": 5 * n, name: new})
    monkeypatch.setattr(cards, "fingerprint", 1)
    with pytest.raises(cc.UserError, match="was made with other images"):
        go_on(resume=True, steps=6 * n)


def start_run(out, *arguments):
    """A training run in a process of its own, which has saved a checkpoint -> process."""
    code = "import contextclip as cc; cc.SAVE_EVERY = 10; cc.main()"
    process = run("-c", code, *SMALL, "--objective", "clixp", "--out", out, *arguments)
    while not (out / "clixp.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_runs_that_are_killed_or_stopped_are_resumed_one_at_a_time(tmp_path, capsys):
    process = start_run(tmp_path / "parts", "--steps", "200")
    line = refuse(capsys, "--out", tmp_path / "parts")
    process.kill()
    process.communicate()
    assert "another run is writing there" in line
    assert 10 <= cc.read_checkpoint(tmp_path / "parts" / "clixp.pt")["log"][-1][0] < 300
    options = [*SMALL, "--objective", "clixp", "--steps", "200", "--resume", "--out"]
    for name in ("parts", "whole"):
        cc.main([*options, str(tmp_path / name)])
    equal_runs(*(tmp_path / name / "clixp.pt" for name in ("parts", "whole")))
    process = start_run(tmp_path / "stopped", "--steps", "20000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert re.search(r"contextclip: stopped; the same command with --resume", errors)


def test_post_training_starts_from_the_weights_of_the_base(cards, tmp_path):
    train(cards, tmp_path, "siglip")
    base = cc.read_checkpoint(tmp_path / "siglip.pt")
    train(cards, tmp_path, "siglixp", init=base, lr=0.0, steps=1)
    a, b = base["model"], cc.read_checkpoint(tmp_path / "siglixp.pt")["model"]
    assert b["log_tau"][1] == b["log_tau"][0] == a["log_tau"][0] != make_model().log_tau[0]
    assert b["b"][1] == b["b"][0] == a["b"][0] != -math.log(15)
    exact(*({n: p for n, p in m.items() if n not in ("log_tau", "b")} for m in (a, b)))
    base["settings"]["objective"] = "siglixp"  # with context it has temperatures of its own
    base["model"]["log_tau"] = torch.tensor([9.0, -1.0, -3.0])
    train(cards, tmp_path, "siglixp", init=base, lr=0.0, steps=1)
    found = cc.read_checkpoint(tmp_path / "siglixp.pt")["model"]["log_tau"]
    torch.testing.assert_close(found, torch.tensor([math.log(100), 0, -3]))  # and their range
    with pytest.raises(cc.UserError, match="the checkpoint has another vocabulary"):
        train(cards, tmp_path, "siglixp", init=base | {"vocabulary": ["<pad>", "<unk>"]})


def test_a_failed_save_and_an_infinite_loss_keep_a_checkpoint(cards, tmp_path, monkeypatch, capsys):
    def write_bytes(path, content):
        path.open("wb").write(content[:100])
        raise OSError(28, "No space left on device")

    draw = cc.Cards.draw_batch
    broken = lambda *a: (draw(*a)[0] / (a[2] != 17), draw(*a)[1])  # noqa: E731
    monkeypatch.setattr(cc.Cards, "draw_batch", broken)
    monkeypatch.setattr(cc, "SAVE_EVERY", 10)
    with pytest.raises(cc.UserError, match="not finite at step 20, .*clip.pt is not touched"):
        train(cards, tmp_path, "clip")
    before = (tmp_path / "clip.pt").read_bytes()
    assert cc.read_checkpoint(tmp_path / "clip.pt")["log"][-1][0] == 10
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert "No space left on device" in refuse(capsys, "--objective", "clip", "--out", tmp_path)
    assert (tmp_path / "clip.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_weight_decay_spares_gains_and_the_learning_rate_has_a_warm_up(cards, tmp_path):
    train(cards, tmp_path, steps=1, weight_decay=0.3)
    groups = cc.read_checkpoint(tmp_path / "clixp.pt")["optimizer"]["param_groups"]
    matrices = [p.ndim >= 2 for p in cc.load(tmp_path / "clixp.pt").parameters()]
    found = sorted((group["weight_decay"], len(group["params"])) for group in groups)
    assert found == [(0.0, matrices.count(False)), (0.3, matrices.count(True))]
    found = [cc.learning_rate(n, cc.Settings(steps=100, lr=0.5)) for n in (1, 4, 5, 6, 51, 100)]
    cosine = [0.25 * (1 + math.cos(math.pi * x)) for x in (0.04, 0.05, 0.5, 0.99)]
    assert found == pytest.approx([0.1, 0.4, *cosine])


def test_it_warns_when_the_loss_stays_at_chance_and_only_then(cards, tmp_path, capsys, monkeypatch):
    batch = cards.draw_batch(cc.Settings(batch_size=16), 1)
    for lr, warnings in ((0.0, 1), (5e-3, 0)):
        train(cards, tmp_path, "clip", steps=100 if lr == 0 else 400, lr=lr)
        assert capsys.readouterr().out.count("the loss is still at chance") == warnings
        monkeypatch.setattr(cc.Cards, "draw_batch", lambda *_: batch)


def test_encoders_are_compiled_when_asked_and_a_model_is_used_in_five_lines(tmp_path, monkeypatch):
    compiled = []
    note = lambda self, *a, **k: compiled.append(type(self))  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", note)
    for flags in ([], ["--compile"]):
        assert not compiled
        cc.main([*SMALL, "--objective", "clip", "--out", str(tmp_path), *flags])
    assert compiled == [torch.nn.Sequential, cc.TextEncoder]
    model = cc.load(tmp_path / "clip.pt")
    image = cc.preprocess(model.settings)(Image.new("RGB", (50, 40), "red"))
    tokens = cc.tokenize(["latin small letter a", "digit one", "zzz"], model.vocabulary)
    similarity = model.encode_image(image[None], True) @ model.encode_text(tokens, True).T
    assert similarity.shape == (1, 3) and similarity.abs().max() <= 1.001


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_never_waits_for_the_gpu(tmp_path, monkeypatch):
    draw, mode = cc.Cards.draw_batch, torch.cuda.set_sync_debug_mode
    data = cc.Cards(cc.choose_device("cuda"), cc.Settings(characters=60))
    watched = lambda *a: mode("error" if 1 < a[2] < 10 else "default") or draw(*a)  # noqa: E731
    monkeypatch.setattr(cc.Cards, "draw_batch", watched)
    for objective in cc.OBJECTIVES:
        train(data, tmp_path, objective, steps=10, precision="auto")  # at the tenth it logs


BAD = "--objective clop|--batch-size 1|--batch-size 1000000000000|--seed 18446744073709551616"
BAD += "|--seed -1|--alpha nan|--alpha 2.5|--lr -1.5|--encoder resnet19|--encoder fcn_resnet50"
BAD += "|--encoder fasterrcnn_resnet50_fpn|--encoder alexnet|--device meta|--device x|--data none"
BAD = {arguments: rf"{arguments}[:,] " for arguments in BAD.split("|")}
BAD["--data x.tar"] = "--data x.tar: there is no such file or folder"
for name in ("none", "foreign", "truncated", "keys"):
    BAD[f"--init {name}.pt"] = f"{name}.pt is not a checkpoint of contextclip: "
BAD["--init weights.pt"] = "--init, --resume: the checkpoint does not fit: "
BAD["--init old.pt"] = r"old.pt is of another version of contextclip \(contextclip-2\): train"
BAD["--out old --resume"] = r"clip.pt is of another version of contextclip \(contextclip-2\)"
BAD["--out foreign.pt"] = "File exists: 'foreign.pt'"


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_exit_status_2(arguments, cards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(cards, tmp_path / "old", "clip", steps=1)
    content = cc.read_checkpoint("old/clip.pt")
    start = Path("old/clip.pt").read_bytes()[:9999]
    write_files(tmp_path, {"foreign.pt": "no checkpoint", "truncated.pt": start})
    torch.save({k: v for k, v in content.items() if k != "vocabulary"}, "keys.pt")
    torch.save(content | {"model": {"b": content["model"]["b"]}}, "weights.pt")
    for path in ("old.pt", "old/clip.pt"):
        torch.save(content | {"format": "contextclip-2"}, path)
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    assert re.search(BAD[arguments], refuse(capsys, "--out", "new", *arguments.split()))
    after = {path: path.read_bytes() for path in Path().rglob("*.*") if path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_encoders_of_torchvision_train_and_ask_for_weights_once(cards, tmp_path, monkeypatch, name):
    asked, get, states = [], cc.models.get_model, []
    watch = lambda _, m: states.append(copy.deepcopy(m.image_encoder.state_dict()))  # noqa: E731
    look = lambda n, weights: asked.append(weights) or get(n)  # noqa: E731
    monkeypatch.setattr(cc.models, "get_model", look)
    monkeypatch.setattr(cc.Cards, "validate", lambda *_: {})
    monkeypatch.setattr(cc, "LOG_EVERY", 1)
    train(cards, tmp_path, steps=2, batch_size=4, encoder=name, pretrained=True, watch=watch)
    a, b = states
    assert np.mean([not torch.equal(a[n], b[n]) for n in a if ".aux" not in n]) > 0.9
    v = cc.load(tmp_path / "clixp.pt").encode_image(torch.rand(3, 1, 50, 50))
    assert asked == ["DEFAULT", None] and v.shape == (3, 16)


def test_a_vit_takes_the_size_of_the_images():
    encoder = cc.torchvision_encoder("vit_b_16", None, 48, 8)
    assert encoder[0].image_size == 48 and encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 8)


# ---- images and captions of one's own ------------------------------------------------------------


def write_files(folder, files):
    """{path: text, bytes or, for an image, its colour}."""
    for path, content in ((folder / name, content) for name, content in files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (44, 32), content).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_photos(folder, n=30):
    """n images of one colour each, with two captions each; every word comes often."""
    images = {f"Images/{i}.png": (8 * i, 240 - 8 * i, 99) for i in range(n)}
    animals = ["dogs", "cats", "birds", "cows"]
    rows = [f"{i}.png,a {w} of {animals[i % 4]}\n" for i in range(n) for w in ("photo", "view")]
    return write_files(folder, images | {"captions.txt": "image,caption\n" + "".join(rows)})


def photos_of(folder, skip_bad=False):
    return cc.Photos("cpu", cc.Settings(data=str(folder), batch_size=8), skip_bad)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return photos_of(write_photos(tmp_path_factory.mktemp("photos")))


COCO = """{"images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
"annotations": [{"image_id": 7, "caption": "a dog"}, {"image_id": 8, "caption": "a cat"},
{"image_id": 8, "caption": "cats"}]}"""
FORMATS = [
    ("captions.txt", "Images", "image,caption\n", "{},{}\n"),
    ("captions.txt", "images", "image_name,comment_number,comment\n", "{},0,{}\n"),
    ("results.csv", "flickr30k_images", "image_name| comment_number| comment\n", "{}| 0| {}\n"),
    ("Flickr8k.token.txt", "Flicker8k_Dataset", "", "{}#0\t{}\n"),
    ("train.tsv", ".", "filepath\ttitle\n", "{}\t{}\n"),
    ("metadata.csv", ".", "file_name,text\n", "{},{}\n"),
    ("table.csv", ".", "\ufeffPATH;Split;Caption\r\n", "{};x;{}\r\n"),
    ("captions_train2017.json", "train2017", COCO, ""),
    ("annotations/captions_train2017.json", "../train2017", COCO, ""),
]


@pytest.mark.parametrize("table, place, header, row", FORMATS)
def test_tables_of_many_kinds_are_read(tmp_path, table, place, header, row):
    rows = [("1.jpg", "a dog"), ("2.jpg", "a cat"), ("2.jpg", "cats")]
    write_files(tmp_path, {table: header + "".join(row.format(*pair) for pair in rows)})
    folder = (tmp_path / table).parent
    write_files(folder, {f"{place}/{n}.jpg": (n, n, n) for n in (1, 2)})
    for source in (folder, tmp_path / table):
        captions, paths, bad = cc.read_captions(source)
        captions = {name: [c.strip() for c in found] for name, found in captions.items()}
        assert captions == {"1.jpg": ["a dog"], "2.jpg": ["a cat", "cats"]} and not bad
        assert paths["2.jpg"].samefile(folder / place / "2.jpg")


def test_bad_rows_cost_themselves_alone(tmp_path):
    rows = ["image,caption", '1.jpg,"a ""big"" dog, asleep"', '1.jpg,"two', 'lines"']
    rows += ['2.jpg,"a cat, awake"', "2.jpg,three,columns", "", "2.jpg, ."]
    rows += ["none.jpg,a dog", f"1.jpg,{'long ' * 30000}", "caf\u00e9.jpg,a cup"]
    text = "\n".join(rows).encode() + "\n2.jpg,caf\u00e9\n2.jpg,last".encode("latin-1")
    images = {f"{name}.jpg": (1, 2, 3) for name in ("1", "2", "cafe\u0301")}
    captions, paths, bad = cc.read_captions(write_files(tmp_path, images | {"captions.txt": text}))
    assert captions.pop("1.jpg") == ['a "big" dog, asleep', "two\nlines", "long " * 30000]
    assert captions == {"2.jpg": ["a cat, awake", "last"], "caf\u00e9.jpg": ["a cup"]}
    assert paths["caf\u00e9.jpg"].is_file() and "there is no image none.jpg" in str(bad)
    assert sorted(int(re.search(r", (\d+): ", line)[1]) for line in bad) == [6, 8, 9, 12]


def test_pairs_of_image_and_text(tmp_path):
    files = {"README.txt": "of no image", ".DS_Store": "", "Thumbs.db": "", "__MACOSX/a.txt": "no"}
    files |= {"Z.TXT": "a cat", "sub/front.txt": "a bird\r\n", "two/front.txt": b"caf\xe9\nok"}
    images = ["a.jpg", "a.png", "Z.JPG", "sub/front.jpg", "two/front.jpg", "sub/lonely.webp"]
    images += ["._a.jpg", "__MACOSX/a.jpg", ".ipynb_checkpoints/a.jpg", "sub/.x/a.jpg"]
    files |= dict.fromkeys(images, "") | {"a.txt": "a dog\n \nb\n\n"}
    data = write_files(tmp_path / "data", files)
    other = write_files(tmp_path / "other", {"front.jpg": "", "front.txt": "a cow"})
    (data / "link").symlink_to(other, target_is_directory=True)
    for folder in ("sub", "two"):
        (data / folder / "loop").symlink_to(data, target_is_directory=True)
    captions, paths, bad = cc.read_captions(data)
    expected = {"a.jpg": ["a dog", "b"], "a.png": ["a dog", "b"], "Z.JPG": ["a cat"]}
    expected |= {"sub/front.jpg": ["a bird"], "two/front.jpg": ["ok"], "link/front.jpg": ["a cow"]}
    assert captions == expected and all(paths[name].is_file() for name in captions)
    assert len(bad) == 2 and "sub/lonely.webp: it has no caption" in str(bad)


def test_held_out_images_never_train(tmp_path):
    files = {f"item{n:02}/front.png": (9 * n, 0, 0) for n in range(20)}  # all of one base name
    files |= {f"item{n:02}/front.txt": "seen from the front" for n in range(20)}
    data = photos_of(write_files(tmp_path / "pairs", files))
    assert sorted([*data.train.tolist(), *data.held_out["dev"]]) == list(range(20))
    assert len(data.held_out["dev"]) == 2 and len(data.images[:, 0, 0, 0].unique()) == 20
    lists = {"Flickr_8k.devImages.txt": "1.png\n2.png\n", "Flickr_8k.testImages.txt": "3.png\r\n"}
    data = photos_of(write_files(write_photos(tmp_path), lists))
    assert (data.held_out, [*data.train]) == ({"dev": [1, 2], "test": [3]}, [0, *range(4, 30)])


RARE = "image,caption\n" + "".join(f"{n}.png,w{n}\n" for n in range(30))
REFUSED = [
    ("which of ", lambda data: write_files(data, {"results.csv": "image,caption\n"})),
    ("no table of images and", lambda data: write_files(data, {"captions.txt": "a,b\n1,2\n"})),
    ("there is no image 4.png (2 such); --skip-bad", lambda d: (d / "Images/4.png").unlink()),
    ("4.png cannot be read", lambda data: write_files(data, {"Images/4.png": b"\x89PNG\r\n"})),
    ("5 images to train on", lambda data: write_photos(data, 6)),
    ("% of the words come fewer", lambda data: write_files(data, {"captions.txt": RARE})),
]


@pytest.mark.parametrize("message, break_data", REFUSED)
def test_data_of_no_use_are_refused_in_one_line(message, break_data, tmp_path, capsys):
    data, out = write_photos(tmp_path / "data"), tmp_path / "out"
    break_data(data)
    line = refuse(capsys, "--data", data, "--batch-size", 8, "--out", out)
    assert message in line and str(data) in line and not list(out.glob("clip*"))
    if "4.png" in message:
        assert len(photos_of(data, skip_bad=True).images) == 29


def test_photos_are_those_of_the_folder_and_once_in_a_batch(photos, monkeypatch):
    red, words = photos.images[:, 0].flatten(1), list(photos.vocabulary)
    assert red.amin(1).tolist() == red.amax(1).tolist() == [8 * i for i in range(30)]
    captions = [[" ".join(words[t] for t in row) for row in rows] for rows in photos.tokens]
    assert captions[1] == ["a photo of cats", "a view of cats"] and photos.counts.eq(2).all()

    def draw(step, rank=0):
        monkeypatch.setattr(cc, "RANK", rank)
        cc.seed_step(settings, step)
        images, words = photos.draw_batch(settings, step)
        return (images[:, 0].mean((1, 2)) * 255 / 8).round().int().tolist(), words.tolist()

    settings, seen = cc.Settings(data="x", batch_size=20), set()
    for step in range(20):
        chosen, words = draw(step)
        assert len(set(chosen)) == 20 and set(chosen) <= set(photos.train.tolist())
        pairs = [*zip(chosen, words, strict=True)]
        assert all(row in photos.tokens[i].tolist() for i, row in pairs)
        seen |= {(i, *row) for i, row in pairs}
    assert len(seen) > 50  # of 27 images with two captions each
    monkeypatch.setattr(cc, "PROCESSES", 2)
    assert draw(19)[0] + draw(19, rank=1)[0] == chosen


def test_photos_are_cropped_within_and_mirrored_half_the_time(photos):
    data, settings = copy.copy(photos), cc.Settings(data="x", batch_size=24)
    ramp = torch.arange(32).expand(30, 32, 32)
    data.images = 8 * torch.stack((ramp, ramp.mT, ramp), 1).byte()  # column, row
    torch.manual_seed(0)
    images = torch.cat([data.draw_batch(settings, step)[0] for step in range(20)]) * 255 / 8
    x, y = images[:, 0].mean(1), images[:, 1].mean(2)
    assert min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) <= 31
    across, up = (x[:, 30] - x[:, 1]) / 29, (y[:, 30] - y[:, 1]) / 29
    assert 0.4 < (across > 0).float().mean() < 0.6
    torch.testing.assert_close(across.abs(), up, rtol=0, atol=0.02)  # a square
    assert 0.5 <= up.square().min() < 0.55 and 0.95 < up.square().max() < 1.001


def test_recall_equals_a_plain_loop(photos):
    g, expected, chosen = torch.Generator().manual_seed(0), {}, list(range(0, 30, 2))
    words = torch.randint(2, 6, (30, 3, 7), generator=g)
    words[::4, 2] = 0  # these have two captions
    images = torch.randint(0, 256, (30, 3, 32, 32), generator=g).byte()
    model = cc.ContextCLIP(cc.Settings(data="x", width=16), photos.vocabulary).eval()
    x = model.encode_image(images / 255, True).detach()
    texts = [(i, row) for i in chosen for row in words[i] if row[0]]
    t = model.encode_text(torch.stack([row for _, row in texts]), True).detach()
    s = {(i, n): (x[i] * t[n]).sum().item() for i in chosen for n in range(len(t))}
    for k in (1, 5, 10):
        hits = [sum(s[j, n] > s[i, n] for j in chosen) < k for n, (i, _) in enumerate(texts)]
        expected[f"dev text>image R@{k}"] = 100 * np.mean(hits)
        best = {i: sorted((-s[i, n], j) for n, (j, _) in enumerate(texts))[:k] for i in chosen}
        hits = [any(j == i for _, j in best[i]) for i in chosen]
        expected[f"dev image>text R@{k}"] = 100 * np.mean(hits)
    data = copy.copy(photos)
    data.tokens, data.images, data.held_out = words, images, {"dev": chosen}
    assert data.validate(model) == pytest.approx(expected, abs=1e-3)


def test_photos_train_resume_exactly_and_are_refused_when_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cc, "SAVE_EVERY", 10)
    data, paths = write_photos(tmp_path / "data"), [tmp_path / n / "clixp.pt" for n in "ab"]
    options = [*SMALL, "--data", str(data), "--batch-size", "8", "--objective", "clixp", "--out"]
    cc.main([*options, str(tmp_path / "a")])
    changes = {"data": str(data), "characters": 60, "batch_size": 8}
    with pytest.raises(ZeroDivisionError):
        train(photos_of(data), tmp_path / "b", watch=lambda step, _: 1 / (step - 30), **changes)
    capsys.readouterr()
    for path, note in zip(paths, ("", f"note: the training of {paths[1]} is not"), strict=True):
        cc.load(path)
        assert capsys.readouterr().out[: len(note) or 1] == note
    cc.main([*options, str(tmp_path / "b"), "--resume"])
    equal_runs(*paths)
    log = cc.read_checkpoint(paths[0])["log"]
    assert log[-1][1] < log[0][1] - 0.05
    write_files(data, {"Images/7.png": (1, 2, 3)})
    with pytest.raises(cc.UserError, match="was made with other images or captions"):
        train(photos_of(data), tmp_path / "b", resume=True, **changes)


def test_images_of_every_kind_are_read_upright_and_in_colour(tmp_path):
    corner = lambda image: cc.open_image(image).getpixel((0, 0))  # noqa: E731
    half, exif = Image.new("RGB", (60, 40), (200, 0, 0)), Image.Exif()
    half.paste((0, 0, 200), (30, 0, 60, 40))
    exif[274] = 6  # turned to the right by 90 degrees
    half.save(tmp_path / "turned.jpg", exif=exif)
    turned = cc.open_image(tmp_path / "turned.jpg")
    assert turned.size == (40, 60) and corner(turned)[0] > 190 and turned.getpixel((9, 55))[2] > 190
    Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.linspace(4, 0, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "f.tif")
    assert corner(tmp_path / "deep.png") == (127,) * 3 and corner(tmp_path / "f.tif") == (255,) * 3
    assert corner(Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == (255, 255, 255)
    assert corner(Image.new("LA", (8, 8), (0, 128))) == (127, 127, 127)
    half.quantize(4).save(tmp_path / "palette.gif")
    half.convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert all(corner(tmp_path / name)[0] > 180 for name in ("palette.gif", "cmyk.jpg"))
    Image.new("P", (8, 8), 0).save(tmp_path / "clear.png", transparency=0)
    assert corner(tmp_path / "clear.png") == (255, 255, 255)


# ---- fewshot.py ----------------------------------------------------------------------------------

HYPER = {
    "Tip-Adapter": {"a": 3.0, "b": 5.0}, "Tip-X": {"a": 3.0, "b": 5.0, "g": 2.0},
    "Tip-Adapter-F": {"a": 3.0, "b": 5.0, "lr": 1e-2}, "linear probe": {"l2": 1e-2},
    "plurality vote": {"k": 4}, "softmax vote": {"k": 4}, "rank vote": {"k": 4},
    "GDA": {"shrink": 0.1}, "GDA + text": {"shrink": 0.1, "trust": 2.0},
}  # fmt: skip
CLOSED = [name for name in fs.CLASSIFIERS if name not in ("linear probe", "Tip-Adapter-F")]


def episode(shots=3, classes=4, queries=7, d=6, seed=0):
    """query, support, labels, text, scale in float64."""
    g = torch.Generator().manual_seed(seed)
    sizes = (queries, d), (shots * classes, d), (classes, d)
    rows = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    query, support, text = (normalize(x, dim=1) for x in rows)
    return query, support, torch.arange(classes).repeat(shots), text, torch.tensor(2.0)


def naive_scores(name, q, s, labels, text, scale, h):
    """The scores of one query, class by class, from the equations of the docstrings."""
    C, cos = len(text), [float(q @ x) for x in s]
    near = list(zip(cos, labels, strict=True))
    of = [[x for x, y in zip(s, labels, strict=True) if y == c] for c in range(C)]
    means = [sum(rows) / len(rows) for rows in of]
    if name == "zero-shot":
        return [float(q @ t) for t in text]
    if name == "prototypes":
        return [float(q @ (m / m.norm())) for m in means]
    if name.startswith("GDA"):
        rest = [x - means[y] for x, y in zip(s, labels, strict=True)]
        S = sum(torch.outer(r, r) for r in rest) / len(rest)
        S = (1 - h["shrink"]) * S + h["shrink"] * S.trace() / len(S) * torch.eye(len(S)).to(S)
        inverse = S.inverse()
        plain = [float(q @ inverse @ m - m @ inverse @ m / 2) for m in means]
        add = h.get("trust", 0) * scale
        return [p + add * float(q @ t) for p, t in zip(plain, text, strict=True)]
    if name in ("Tip-Adapter", "Tip-X"):
        out = []
        for c in range(C):
            keys = sum(math.exp(-h["b"] * (1 - v)) for v, y in near if y == c)
            out.append(float(scale * (q @ text[c])) + h["a"] * keys)
        if name == "Tip-Adapter":
            return out
        p_q = (text @ q / 0.1).softmax(0)
        kl = [float((p_q * (p_q / (text @ x / 0.1).softmax(0)).log()).sum()) for x in s]
        low, high = -max(kl), -min(kl)
        stretch = (max(cos) - min(cos)) / (high - low)
        affinity = [min(cos) + (-k - low) * stretch for k in kl]
        for v, y in zip(affinity, labels, strict=True):
            out[y] += h["g"] * v
        return out
    out, k = [0.0] * C, h["k"]
    for rank, (v, y) in enumerate(sorted(near, reverse=True)[:k]):
        weights = {"softmax vote": math.exp(v / 0.07), "rank vote": 1 / (2 + rank)}
        out[y] += weights.get(name, 1 + (k - rank) / (k * (k + 1)))
    return out


@pytest.mark.parametrize("shots", [2, 5])
@pytest.mark.parametrize("name", CLOSED)
def test_classifiers_equal_naive_loops(name, shots):
    query, support, labels, text, scale = episode(shots)
    h = HYPER.get(name, {})
    scores = fs.CLASSIFIERS[name][0](query, support, labels, text, scale, **h)
    expected = [naive_scores(name, q, support, labels.tolist(), text, 2.0, h) for q in query]
    torch.testing.assert_close(scores, torch.tensor(expected).to(scores), rtol=1e-6, atol=1e-6)


def test_gda_of_one_shot_is_the_prototype_classifier_and_beats_it_with_a_nuisance():
    e = episode(shots=1)
    scores = fs.gda(*e, shrink=0.1)
    assert torch.equal(scores.argsort(1), fs.prototypes(*e).argsort(1))
    g = torch.Generator().manual_seed(0)
    centres = torch.zeros(4, 20)
    centres[:, :4] = torch.eye(4)
    noise = torch.zeros(20)
    noise[10:] = 3.0  # directions in which images vary, whatever their class
    labels = torch.arange(4).repeat(16)
    noisy = (centres[labels] + noise * torch.randn(64, 20, generator=g) for _ in range(2))
    support, query = (normalize(x, dim=1) for x in noisy)
    found = fs.gda(query, support, labels, centres, 0.0, shrink=0.01)
    others = fs.prototypes(query, support, labels, centres, 0.0)
    right = [(scores.argmax(1) == labels).float().mean() for scores in (found, others)]
    assert right[0] > right[1] + 0.2


def test_the_linear_probe_is_where_its_loss_has_no_slope():
    query, support, labels, text, scale = episode(5)
    support, text = support.float(), text.float()
    probe = partial(fs.linear_probe, support=support, labels=labels, text=text, scale=scale)
    c = probe(torch.zeros(1, 6), l2=1e-2)[0]
    W = (probe(torch.eye(6), l2=1e-2) - c).T  # linear: read off
    W.requires_grad_()
    loss = F.cross_entropy(support @ W.T + c, labels) + 5e-3 * W.square().sum()
    loss.backward()
    assert W.grad.abs().max() < 1e-3


def test_tip_adapter_f_trains_keys_by_the_others_of_the_support():
    _, support, labels, text, scale = episode(8)
    query, text = support + 0.01, text.roll(1, 0)
    tune = partial(fs.tip_adapter_f, query, support, labels, text, scale, a=1.0, b=5.0, lr=1e-2)
    steps = [tune(steps=n) for n in (0, 1, 20)]
    assert F.cross_entropy(steps[2], labels) < F.cross_entropy(steps[0], labels)
    torch.testing.assert_close(steps[0], fs.tip_adapter(query, support, labels, text, scale, 1, 5))
    keys = support.clone().requires_grad_()  # one step of AdamW, whose decay is 0.01, by hand
    near = (5 * (support @ keys.T - 1)).exp() * (1 - torch.eye(32))
    scores = scale * support @ text.T + near @ F.one_hot(labels, 4).to(near)
    (g,) = torch.autograd.grad(F.cross_entropy(scores, labels), keys)
    keys = keys.detach() * (1 - 1e-2 * 1e-2) - 1e-2 * g / (g.abs() + 1e-4)
    expected = fs.tip_adapter(query, keys, labels, text, scale, 1, 5)
    torch.testing.assert_close(steps[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", fs.CLASSIFIERS)
def test_permuting_the_classes_permutes_the_scores(name):
    query, support, labels, text, scale = episode()
    order = torch.tensor([2, 0, 3, 1])  # class c is called order[c]
    classify = partial(fs.CLASSIFIERS[name][0], query, support, scale=scale, **HYPER.get(name, {}))
    if name == "linear probe":
        classify = partial(classify.func, query.float(), support.float(), scale=scale, l2=1e-2)
        text = text.float()
    scores = classify(labels=labels, text=text)
    permuted = classify(labels=order[labels], text=text[order.argsort()])
    torch.testing.assert_close(permuted[:, order], scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", fs.CLASSIFIERS)
def test_random_embeddings_give_chance_and_separable_ones_100_percent(name):
    C, shots, g = 10, 4, torch.Generator().manual_seed(0)
    query, support = (normalize(torch.randn(n * C, 32, generator=g), dim=1) for n in (200, shots))
    text = normalize(torch.randn(C, 32, generator=g), dim=1)
    h = HYPER.get(name, {})
    assert abs(fs.accuracy(name, (query, support, text, 10.0), shots, h) - 10) < 3
    near = (text.repeat(n, 1) + 0.02 * torch.randn(n * C, 32, generator=g) for n in (200, shots))
    query, support = (normalize(x, dim=1) for x in near)
    assert fs.accuracy(name, (query, support, text, 10.0), shots, h) == 100


def test_of_equally_many_votes_the_nearer_ones_win():
    support = normalize(torch.tensor([[1.0, 0.5], [1.0, 0.1], [1.0, 0.6], [1.0, 0.9]]), dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    vote = fs.CLASSIFIERS["plurality vote"][0]
    scores = vote(torch.tensor([[1.0, 0.0]]), support, labels, torch.eye(2), None, k=4)
    assert scores[0, 1] > scores[0, 0] and int(scores.floor().sum()) == 4


def test_text_scale_is_the_likeliest_and_0_for_captions_that_say_nothing():
    _, support, labels, text, _ = episode(shots=5)

    def likelihood(scale):
        rows = zip(support, labels, strict=True)
        return sum(float((scale * text @ x).log_softmax(0)[y]) for x, y in rows)

    best = max([0, *(10.0 * 2.0**i for i in range(-6, 1))], key=likelihood)
    assert fs.text_scale(support, labels, text, 10.0).item() == best
    assert fs.text_scale(text, torch.arange(4), text.roll(1, 0), 10.0).item() == 0
    assert fs.text_scale(text, torch.arange(4), text, 10.0).item() == 10


@pytest.fixture(scope="session")
def all_cards():
    return cc.Cards("cpu", cc.Settings())


def test_there_are_21_tasks_in_three_groups(all_cards):
    cards, tasks = all_cards, fs.card_tasks(all_cards)
    assert len(tasks) == 21 and {task.group for task in tasks} == {"seen", "combined", "unseen"}
    assert all(10 <= len(task.captions) <= 40 for task in tasks)
    names = {group: set() for group in ("seen", "combined", "unseen")}
    for task in tasks:
        names[task.group] |= {name for (name,) in task.captions}
    trained = {cards.names[i] for i in cards.train}
    validated = {cards.names[i] for members in cards.validation.values() for i in members}
    new = names["combined"] | names["unseen"]
    assert names["seen"] <= trained and not new & (trained | validated)
    few = cc.Cards("cpu", cc.Settings(characters=200))
    for data, found in ((cards, tasks), (few, fs.card_tasks(few))):
        known = [name for task in found if task.group != "unseen" for (name,) in task.captions]
        assert all({*cc.split_words(name)} <= data.vocabulary.keys() for name in known)
    assert sum(len(task.captions) for task in tasks) == len(names["seen"] | new)  # no class twice


def test_tasks_draw_in_typefaces_of_their_own(all_cards, monkeypatch):
    def draw(cards, members, group):
        there = cards.drawn[members, cc.FACE_SPLITS[group]].any(1)
        used.append((group, bool(there.all())))
        return torch.zeros(len(members), 1, 32, 32), None

    used = []
    monkeypatch.setattr(cc, "draw_cards", draw)
    for task in fs.card_tasks(all_cards) + fs.validation_tasks(all_cards):
        used.clear()
        task.draw(0, 1, 1)
        expected = {"unseen": "train", "validation": "validation"}.get(task.group, "test")
        assert set(used) == {(expected, True)}


def test_supports_are_nested_and_queries_the_same_for_all_shots(all_cards):
    task = fs.card_tasks(all_cards, ["digits"])[0]
    few, many = (task.draw(3, shots, 5) for shots in (2, 7))
    assert few.shape == (7, 10, 1, 32, 32) and torch.equal(few, many[:7])
    assert len(many.flatten(0, 1).flatten(1).unique(dim=0)) == 120  # no card twice
    assert not torch.equal(few, task.draw(4, 2, 5))


def test_the_interval_covers_the_mean_in_95_of_100_cases():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        tasks, runs = rng.normal(size=(12, 1)), rng.normal(size=(1, 12))
        mean, width = fs.interval(1 + tasks + runs + rng.normal(size=(12, 12)))
        hits += abs(mean - 1) <= width
    assert 0.91 <= hits / 400 <= 0.99
    values = np.array([[1.0, 2.0, 4.0]])
    assert fs.interval(values) == pytest.approx((7 / 3, 4.30 * values.std(ddof=1) / 3**0.5))
    assert fs.interval(np.array([[2.0, 0], [0, -2]]))[1] == pytest.approx(12.71 * (4 / 3) ** 0.5)


def test_sample_efficiency_by_hand():
    shots, base = [1, 2, 4], [10.0, 20.0, 40.0]
    found = fs.efficiency(base, [20.0, 30.0, 50.0], shots)
    assert found.tolist() == pytest.approx([2, 2**1.5 / 2, math.inf])


def test_draws_of_one_training_run_count_as_one():
    rows = [("clip", "a", "seen", "prototypes", 1, s, v) for s, v in enumerate([1, 3, 5, 7])]
    table = fs.tabulate(rows, per_run=2)
    assert table["clip", "prototypes", 1].tolist() == [[2, 6]]
    table = fs.tabulate(rows, per_run=4)
    assert table["clip", "prototypes", 1].tolist() == [[1, 3, 5, 7]]


def test_the_table_of_gains_is_context_less_base(capsys):
    base = np.array([[1.0, 2.0], [5.0, 6.0], [1.0, 2.0]])
    context = base + [[2], [-1], [2]]
    table = {("clip", fs.MEAN, 4): base, ("clixp", fs.MEAN, 4): context}
    tasks = [fs.Task(name, "seen", [], None) for name in "abc"]
    fs.compare(table, tasks, "clip", "clixp", [fs.MEAN], [4])
    printed = capsys.readouterr().out
    assert "+1.0 ± " in printed and "2 of 3" in printed and "nan" not in printed
    assert re.search(r"b +seen +5.5 +4.5 +-1.0 ± 0.0", printed)
    tasks = [fs.Task(group, group, [], None) for group in ("seen", "unseen", "combined")]
    fs.report({("clip", "zero-shot", 0): np.array([[10.0], [30.0]])}, tasks, [4])
    assert "clip, zero-shot, combined: 30.0" in capsys.readouterr().out


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with clip.pt and clixp.pt, hardly trained."""
    out = tmp_path_factory.mktemp("runs")
    cc.main([*SMALL, "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images: three classes of ten, all different, and what systems leave behind."""
    folder = tmp_path_factory.mktemp("pictures")
    for c, name in enumerate(["3", "red_fox", "0 - zero"]):
        (folder / name).mkdir()
        for i in range(10):
            Image.new("L", (40, 32), 20 * i + 5 * c).save(folder / name / f"{i}.png")
        (folder / name / "._0.png").write_bytes(b"system")
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("L", (32, 32)).save(folder / ".ipynb_checkpoints" / "0.png")
    return folder


def run_fewshot(out, *arguments):
    fs.main(["--out", str(out), "--checkpoint", *map(str, sorted(out.glob("*.pt"))), *arguments])


def test_a_small_evaluation_from_end_to_end(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    methods = ["--methods", "zero-shot", *fs.SIX, "GDA + text"]
    tasks = ["--tasks", "digits", "Hebrew", "--shots", "1", "2", "--seeds", "2", "--queries", "2"]
    tasks += methods
    run_fewshot(tmp_path, *tasks)
    printed = capsys.readouterr().out
    assert "clixp - clip" in printed and "GDA + text" in printed and "tasks that gain" in printed
    first = (tmp_path / "fewshot.csv").read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert len(rows) == 2 * 2 * (2 * 7 * 2) + 2 * 2  # models, seeds; tasks, methods, shots; text
    assert {row["task"] for row in rows if row["method"] == "zero-shot"} == {"digits"}
    cell = {"model": "clip", "method": "prototypes", "shots": "2"}
    mean = np.mean([float(row["accuracy"]) for row in rows if row.items() >= cell.items()])
    line = next(line for line in printed.splitlines() if line.startswith("prototypes"))
    assert line.split()[-1] == f"{mean:.1f}"
    assert Image.open(tmp_path / "accuracy_vs_shots.png").size[0] > 300
    run_fewshot(tmp_path, *tasks)
    assert (tmp_path / "fewshot.csv").read_text() == first
    assert not list(tmp_path.glob("*.tmp"))


def test_hyperparameters_are_the_best_of_their_grid_and_the_first_of_equal_ones(monkeypatch):
    monkeypatch.setattr(fs, "accuracy", lambda _, e, shots, h: -abs(h["k"] - 3 * shots) + e)
    monkeypatch.setattr(fs, "episodes", lambda *_: [(0,), (1,)])
    chosen = fs.choose(None, None, ["plurality vote"], [1, 2], 2)
    assert chosen == {"plurality vote": {1: {"k": 2}, 2: {"k": 4}}}


def arguments_of(folder, **changes):
    given = {"out": folder, "shots": [2], "queries": 3, "template": ["a {}"]}
    given |= {"skip_bad": False, "plate": False}
    return types.SimpleNamespace(**given | changes)


def test_own_images_are_nested_disjoint_and_captioned(pictures, tmp_path):
    args = arguments_of(tmp_path, shots=[4])
    read = fs.read_dataset(str(pictures), args, cc.Settings())
    task = fs.image_task("own", args, *read)
    few = arguments_of(tmp_path, shots=[2])
    halves = [fs.image_task("own", few, *read, slice(i, None, 2)).draw(0, 2, 3) for i in (0, 1)]
    assert len(torch.cat(halves).flatten(0, 1).flatten(1).unique(dim=0)) == 2 * 3 * 5  # disjoint
    assert task.captions == [["a zero"], ["a three"], ["a red fox"]]
    few, many = (task.draw(0, shots, 3) for shots in (2, 4))
    assert few.shape == (5, 3, 1, 32, 32) and torch.equal(few, many[:5])
    assert len(many.flatten(0, 1).flatten(1).unique(dim=0)) == 21
    assert not torch.equal(few, task.draw(1, 2, 3))


def test_plates_are_laid_over_own_images_in_their_shades(pictures, tmp_path, all_cards):
    images = torch.full((6, 1, 32, 32), 0.8)
    images[:, :, 14:18, 10:20] = 0.1
    plated = fs.with_plates(images, all_cards)
    changed = ((plated - images).abs() > 0.3).flatten(1).sum(1)
    assert (changed > 20).all() and (changed < 24 * 9 / 2).all()  # digits, on a plate of 0.8
    assert plated.min() >= 0.1 - 1e-6 and plated.max() <= 0.8 + 1e-6
    assert torch.equal(plated[:, :, 13:19], images[:, :, 13:19])  # top or bottom, never the middle


def test_own_images_on_the_command_line(trained, tmp_path, pictures, capsys, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    small = [*"--shots 1 2 --queries 3 --seeds 2 --methods zero-shot".split(), *fs.SIX]
    again = shutil.copytree(pictures, tmp_path / pictures.name)  # of the same name, another set
    run_fewshot(tmp_path, "--data", str(pictures), str(again), *small)
    printed = capsys.readouterr().out
    assert " of 2" in printed
    laid = []
    monkeypatch.setattr(fs, "with_plates", lambda images, cards: laid.append(images) or images)
    run_fewshot(tmp_path, "--data", str(pictures), "--plate", *small)
    assert len(laid) == 1 and laid[0].shape == (30, 1, 32, 32)
    assert "zero-shot, own" in printed and "clixp - clip" in printed
    parts = tmp_path / "parts"  # of a folder with parts the test part, and it is said
    for part in ("train", "test"):
        shutil.copytree(pictures, parts / part)
    run_fewshot(tmp_path, "--data", str(parts), *small)
    assert f"{parts}: its part test" in capsys.readouterr().out


def fake_digits(root, download, train):
    """Ten classes without names, as USPS has it."""
    assert download and not train
    return [(Image.new("L", (16, 16), 5 * i), i % 10) for i in range(40)]


def test_torchvision_datasets_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "USPS", fake_digits)
    monkeypatch.setattr(torchvision.datasets, "KMNIST", fake_digits)
    args = arguments_of(tmp_path, shots=[1])
    task = fs.image_task("USPS", args, *fs.read_dataset("USPS", args, cc.Settings()))
    assert task.captions[3] == ["a three"] and task.group == "own"
    task = fs.image_task("KMNIST", args, *fs.read_dataset("KMNIST", args, cc.Settings()))
    assert task.captions[3] == ["a class 3"] and task.group in fs.NO_TEXT
    for name in fs.DATASETS:
        assert hasattr(torchvision.datasets, name)


def test_bad_input_of_an_evaluation_is_one_line(trained, tmp_path, pictures, capsys, monkeypatch):
    common = ["--out", tmp_path, "--checkpoint", trained / "clip.pt"]
    bad = partial(refuse, capsys, program="fewshot")
    assert "no checkpoint" in bad("--out", tmp_path)
    content = cc.read_checkpoint(trained / "clip.pt")
    (tmp_path / "b").mkdir()
    torch.save(content, tmp_path / "b" / "clixp.pt")
    assert "different models" in bad("--checkpoint", trained / "clip.pt", tmp_path / "b/clixp.pt")
    words = [*content["vocabulary"][:-1], "other"]
    torch.save(content | {"vocabulary": words}, tmp_path / "b" / "clip.pt")
    assert "different captions" in bad("--checkpoint", trained / "clip.pt", tmp_path / "b/clip.pt")
    assert "missing.pt" in bad("--checkpoint", tmp_path / "missing.pt")
    (tmp_path / "foreign.pt").write_bytes(b"x")
    assert "not a checkpoint" in bad("--checkpoint", tmp_path / "foreign.pt")
    assert "too few" in bad(*common, "--data", pictures)
    for name in ("MNIST:train", "MNIST:bogus", "VisionDataset", "nowhere"):
        assert "no such folder" in bad(*common, "--data", name)
    assert "--template" in bad(*common, "--data", pictures, "--template", "x")
    assert "--shots" in bad(*common, "--shots", "0")
    (tmp_path / "one" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a" / "0.png")
    assert "two classes" in bad(*common, "--data", tmp_path / "one")
    (tmp_path / "one" / "b").mkdir()
    (tmp_path / "one" / "b" / "0.png").write_bytes(b"broken")
    assert "b/0.png cannot be read" in bad(*common, "--data", tmp_path / "one")
    assert "two classes" in bad(*common, "--data", tmp_path / "one", "--skip-bad")
    needs = ModuleNotFoundError("No module named 'scipy'")
    monkeypatch.setattr(torchvision.datasets, "SVHN", lambda *_, **__: (_ for _ in ()).throw(needs))
    assert "scipy" in bad(*common, "--data", "SVHN")


def test_zero_shot_alone_is_evaluated(trained, tmp_path, capsys):
    small = ["--tasks", "digits", "--methods", "zero-shot", "--queries", "2", "--seeds", "1"]
    fs.main(["--checkpoint", *map(str, trained.glob("*.pt")), "--out", str(tmp_path), *small])
    rows = list(csv.DictReader((tmp_path / "fewshot.csv").open()))
    assert {row["method"] for row in rows} == {"zero-shot"} and len(rows) == 2


@pytest.mark.parametrize("size", [32, 33, 50, 64])
def test_the_cnn_takes_images_of_every_size(size):
    model, seen, images = make_model(image_size=size), [], torch.rand(2, 1, size, size)
    model.image_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert model.encode_image(images).shape == (2, 16)
    torch.testing.assert_close(seen[0], 4 * images - 2)  # and the caller's are as they were
    wide = torch.rand(2, 1, 28, size)
    resized = torchvision.transforms.functional.resize(wide, [size, size])
    exact(model.encode_image(wide), model.encode_image(resized))


def test_help_names_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit):
        cc.main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(cc.Settings):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "(3200)" in text and "(clip,clixp)" in text


def test_spellings_lists_quotes_and_shards_are_not_silently_wrong(tmp_path):
    write_files(tmp_path, {f"{i}.png": (0, 0, 0) for i in range(4)})
    table, rows = tmp_path / "captions.csv", ["image,caption", "0.png,a", f"{tmp_path}/0.png,b"]
    table.write_text("\n".join([*rows, '1.png,"open', "2.webp,c", '3.png,end"']))
    with pytest.raises(cc.UserError, match="a quote is not closed before line 6"):
        cc.read_captions(tmp_path)
    table.write_text("\n".join([*rows, "2.png,c", '3.png,"open']))
    captions, _, bad = cc.read_captions(tmp_path)
    assert captions == {"0.png": ["a", "b"], "2.png": ["c"], "3.png": ["open"]} and not bad
    (tmp_path / "devImages.txt").write_text("images/0.png\n")
    with pytest.raises(cc.UserError, match="none of its lines is an image"):
        cc.split_names(tmp_path, list(captions))
    (tmp_path / "devImages.txt").rename(tmp_path / "._devImages.txt")
    (tmp_path / "trainImages.txt").write_text("./0.png \r\n2.png")
    assert cc.split_names(tmp_path, list(captions)) == ({"dev": {"3.png"}}, {"0.png", "2.png"})
    (tmp_path / "quotes.token").write_text('0.png#0\t"a" dog\n0.png#1\tb"c\n\n')
    found, _, bad = cc.read_captions(tmp_path / "quotes.token")
    assert found == {"0.png": ['"a" dog', 'b"c']} and not bad
    (tmp_path / "shard.tar").write_bytes(b"\0" * 1024)
    (tmp_path / "empty").mkdir()
    for source in ("shard.tar", "empty"):
        with pytest.raises(cc.UserError, match="unpack .tar and .parquet"):
            cc.read_captions(tmp_path / source)


def test_a_checkpoint_of_another_version_is_called_that_whatever_it_lacks(tmp_path):
    torch.save({"format": "contextclip-2", "settings": {}}, tmp_path / "old.pt")
    with pytest.raises(cc.UserError, match="another version of contextclip .contextclip-2."):
        cc.read_checkpoint(tmp_path / "old.pt")
