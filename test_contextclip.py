"""Tests of contextclip.py and fewshot.py: `python -m pytest`. Offline, on the CPU, three to four minutes."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import contextclip as cc
import fewshot as fs

SCRIPT = str(Path(cc.__file__).resolve())
SIZES = [2, 3, 8, 17]
SMALL = ["--steps", "30", "--batch-size", "32", "--width", "32", "--characters", "60", "--precision", "float32", "--device", "cpu"]


@pytest.fixture(scope="session")
def atlas():
    cc.choose_device("cpu")
    return cc.Atlas("cpu", cc.Settings(characters=300))


def embeddings(B, d=6, seed=0):
    """v, t (B, d) float64, not normalised, with gradients."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, d, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]


def make_model(**settings):
    vocabulary = cc.build_vocabulary(["a b c d"])
    return cc.ContextCLIP(cc.Settings(**{"width": 32, "batch_size": 8} | settings), vocabulary)


# ---- losses and context against naive loops, value and gradient -----------------------------------------------------


def naive_normalize(row):
    return row / row.square().sum().sqrt()


def naive_clip(x, t, tau):
    B, total = len(x), 0
    for i in range(B):
        row = sum(torch.exp(tau * (x[i] * t[j]).sum()) for j in range(B))
        column = sum(torch.exp(tau * (x[j] * t[i]).sum()) for j in range(B))
        pair = torch.exp(tau * (x[i] * t[i]).sum())
        total = total - torch.log(pair / row) / 2 - torch.log(pair / column) / 2
    return total / B


def naive_siglip(x, t, tau, b):
    B, total = len(x), 0
    for i in range(B):
        for j in range(B):
            s = tau * (x[i] * t[j]).sum() + b
            total = total - torch.log(1 / (1 + torch.exp(-s if i == j else s)))
    return total / B


def naive_context(v, tau_ctx, mask=True, normalize_values=False, values=None):
    B, d = v.shape
    x = [naive_normalize(row) for row in v]
    values = v if values is None else values
    rows = []
    for i in range(B):
        others = [j for j in range(B) if j != i or not mask]
        weights = [torch.exp((x[i] * x[j]).sum() / (tau_ctx * math.sqrt(d))) for j in others]
        rows.append(sum(w * (naive_normalize(values[j]) if normalize_values else values[j]) for w, j in zip(weights, others)) / sum(weights))
    return torch.stack(rows)


def same(actual, expected, inputs):
    """Equal values, and equal gradients of a fixed random projection."""
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    for a, e in zip(*(torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True, retain_graph=True) for y in (actual, expected))):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("B", SIZES)
def test_contrastive_losses_equal_naive_loops(B):
    v, t = embeddings(B)
    x, y = torch.nn.functional.normalize(v, dim=1), torch.nn.functional.normalize(t, dim=1)
    tau, b = torch.tensor(7.0, dtype=torch.float64, requires_grad=True), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    same(cc.clip_loss(x, y, tau).mean(), naive_clip(x, y, tau), [v, t, tau])
    same(cc.siglip_loss(x, y, tau, b).mean(), naive_siglip(x, y, tau, b), [v, t, tau, b])


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize("switches", [{}, {"mask": False}, {"normalize_values": True}])
def test_context_equals_naive_loop(B, switches):
    v, _ = embeddings(B)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    same(cc.contextualize(v, tau, **switches), naive_context(v, tau, **switches), [v, tau] if B > 2 or switches.get("mask") is False else [v])
    detached = cc.contextualize(v, tau, detach_values=True)
    same(detached, naive_context(v, tau, values=v.detach()), [v] if B == 2 else [v, tau])


def float64_lixp(v, t, model, settings):
    """`lixp_loss` without its conversion to float32."""
    original, torch.Tensor.float = torch.Tensor.float, lambda self: self
    try:
        return cc.lixp_loss(v, t, model, settings)
    finally:
        torch.Tensor.float = original


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize("objective", ["clip", "siglip", "clixp", "siglixp"])
def test_objectives_equal_naive_loops(B, objective):
    v, t = embeddings(B, d=32)
    model = make_model(objective=objective, batch_size=B, alpha=0.9).double()
    with torch.no_grad():  # four different numbers, so that a mixed-up temperature shows
        for name, value in {"log_tau_1": 1.0, "log_tau_2": 1.5, "log_tau_ctx": -3.0, "b_1": -1.0, "b_2": -2.0}.items():
            getattr(model, name).fill_(value)
    y = torch.stack([naive_normalize(row) for row in t])

    def naive(v, log_tau, b):
        x = torch.stack([naive_normalize(row) for row in v])
        return naive_siglip(x, y, log_tau.exp(), b) if "sig" in objective else naive_clip(x, y, log_tau.exp())

    expected = naive(v, model.log_tau_1, model.b_1)
    if objective.endswith("xp"):
        expected = 0.9 * expected + 0.1 * naive(naive_context(v, model.log_tau_ctx.exp()), model.log_tau_2, model.b_2)
    scalars = [model.log_tau_1, model.log_tau_2, model.log_tau_ctx, model.b_1, model.b_2]
    if B == 2:
        scalars.remove(model.log_tau_ctx)  # one other image: its weight is 1 whatever the temperature
    same(float64_lixp(v, t, model, model.settings)[0], expected, [v, t, *scalars])


def test_losses_are_float32_whatever_the_encoders_used():
    v, t = (e.detach().to(torch.bfloat16) for e in embeddings(8, d=32))
    for objective in ("clip", "siglixp"):
        model = make_model(objective=objective)
        losses = cc.lixp_loss(v, t, model, model.settings)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, cc.lixp_loss(v.float(), t.float(), model, model.settings))


def test_losses_stay_finite_at_the_highest_temperature():
    v, t = (1e3 * e.detach().float() for e in embeddings(8, d=32))
    for objective in ("clixp", "siglixp"):
        model = make_model(objective=objective)
        with torch.no_grad():
            model.log_tau_1.fill_(99), model.log_tau_2.fill_(99), model.log_tau_ctx.fill_(-99)
        model.clamp_temperatures()
        assert model.temperatures()[:3] == pytest.approx([cc.SCALE_RANGE[1], cc.SCALE_RANGE[1], cc.TAU_CTX_RANGE[0]], rel=1e-5)
        assert cc.lixp_loss(v, t, model, model.settings).isfinite().all()


def test_chance_loss():
    x = torch.zeros(8, 4)  # no model can tell these apart
    assert cc.chance_loss(cc.Settings("clip", batch_size=8)) == pytest.approx(cc.clip_loss(x, x, 5.0).mean().item())
    biases = torch.linspace(-6, 2, 801)
    best = min(cc.siglip_loss(x, x, 5.0, b).mean().item() for b in biases)
    assert cc.chance_loss(cc.Settings("siglip", batch_size=8)) == pytest.approx(best, abs=1e-4)


def test_mask_keeps_an_image_out_of_its_own_context():
    v, _ = embeddings(8)
    for mask in (True, False):
        jacobian = torch.autograd.functional.jacobian(lambda values: cc.attention(torch.nn.functional.normalize(v, dim=1), 0.1, mask) @ values, v)
        own = jacobian[torch.arange(8), :, torch.arange(8)]  # of x_ctx_i by its own value v_i
        assert (own.abs().max() == 0) == mask
    weights = cc.attention(torch.nn.functional.normalize(v, dim=1), 0.1)
    assert weights.diagonal().abs().max() == 0
    torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.float64))


def test_permuting_the_batch_permutes_the_context_and_keeps_the_loss():
    v, t = (e.detach() for e in embeddings(9, d=32))
    p = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cc.contextualize(v[p], 0.05), cc.contextualize(v, 0.05)[p])
    for objective in ("clip", "siglip", "clixp", "siglixp"):
        model = make_model(objective=objective)
        losses = [cc.lixp_loss(v[i], t[i], model, model.settings) for i in (torch.arange(9), p)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_each_switch_changes_what_it_says_and_nothing_else():
    v, t = (e.detach().float().requires_grad_() for e in embeddings(8, d=32))
    model = make_model(objective="siglixp")
    with torch.no_grad():
        model.log_tau_2 += 0.5
        model.b_2 -= 0.5

    def run(**changes):
        losses = cc.lixp_loss(v, t, model, dataclasses.replace(model.settings, **changes))
        parameters = [v, model.log_tau_1, model.log_tau_2, model.b_2, model.log_tau_ctx]
        return losses.detach(), torch.autograd.grad(losses[2], parameters, allow_unused=True, materialize_grads=True)

    losses, (gv, g1, g2, gb, gctx) = run()
    assert g1 == 0 and g2 != 0 and gb != 0 and gctx != 0  # the context term has temperatures of its own

    for name in ("no_mask", "normalize_values"):  # the context term changes, the plain one does not
        other, _ = run(**{name: True})
        assert other[1] == losses[1] and not torch.isclose(other[2], losses[2], rtol=1e-4)

    other, (dv, *_) = run(detach_values=True)  # the same loss, other gradients
    assert torch.equal(other, losses) and not torch.allclose(dv, gv, rtol=1e-2)

    other, (_, s1, s2, sb, _) = run(shared_temperature=True)
    assert other[1] == losses[1] and other[2] != losses[2] and s1 != 0 and s2 == 0 and sb == 0

    for alpha in (0.0, 0.6, 1.0):
        other, _ = run(alpha=alpha)
        assert torch.equal(other[1:], losses[1:])
        torch.testing.assert_close(other[0], alpha * losses[1] + (1 - alpha) * losses[2])

    base = cc.lixp_loss(v, t, model, dataclasses.replace(model.settings, objective="siglip"))
    assert base[0] == base[1] == losses[1] and base[2] == 0


# ---- large batches, several processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 17, 100])
@pytest.mark.parametrize("switches", [{}, {"no_mask": True}, {"detach_values": True, "normalize_values": True}, {"shared_temperature": True}])
@pytest.mark.parametrize("objective", ["clip", "siglip", "clixp", "siglixp"])
def test_losses_in_blocks_equal_the_plain_ones(objective, switches, chunk):
    v, t = embeddings(17, d=32)
    model = make_model(objective=objective, batch_size=17).double()
    scalars = [model.log_tau_1, model.log_tau_2, model.log_tau_ctx, model.b_1, model.b_2]
    plain, blocks = (float64_lixp(v, t, model, cc.Settings(objective, batch_size=17, chunk=n, **switches)) for n in (0, chunk))
    same(blocks, plain, [v, t, *scalars])


def saved_bytes(objective, B, chunk):
    """What autograd keeps of the loss for the backward pass, each storage counted once."""
    v, t = (x.detach().float().requires_grad_() for x in embeddings(B, d=32))
    model, storages = make_model(objective=objective), {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = cc.lixp_loss(v, t, model, cc.Settings(objective, batch_size=B, chunk=chunk))
    assert loss.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("objective", ["clip", "siglip", "clixp", "siglixp"])
def test_blocks_keep_no_matrix_for_the_backward_pass(objective):
    B, matrix = 512, 4 * 512**2
    assert saved_bytes(objective, B, 0) > matrix
    assert saved_bytes(objective, B, 32) < matrix / 2 and saved_bytes(objective, 2 * B, 32) < 2.5 * saved_bytes(objective, B, 32)


@pytest.mark.parametrize("objective", ["clixp", "siglixp"])
def test_training_in_blocks_is_the_same_training(objective, atlas, tmp_path):
    logs = []
    for chunk in (0, 10):
        train(atlas, tmp_path / str(chunk), objective, steps=20, chunk=chunk)
        logs.append(np.array(cc.read_checkpoint(tmp_path / str(chunk) / f"{objective}.pt")["log"])[:, 1:9])
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-4, atol=1e-5)


PROCESS = """
import sys, torch, contextclip as cc
from torch import distributed as dist
from torch.nn.functional import normalize
store = cc.join_processes(torch.device("cpu")) if sys.argv[1] == "several" else None
torch.set_num_threads(1)
found = {}
for objective in ("clip", "siglip", "clixp", "siglixp"):
    for chunk in (0, 3):
        torch.manual_seed(0)
        settings = cc.Settings(objective, batch_size=16, width=32, chunk=chunk)
        model = cc.ContextCLIP(settings, cc.build_vocabulary(["a b c d"]))
        images, tokens = torch.rand(16, 1, 32, 32), torch.randint(2, 6, (16, 5))
        n = 16 // cc.processes()
        own = slice(cc.rank() * n, cc.rank() * n + n)
        losses = cc.lixp_loss(*model(images[own], tokens[own]), model, settings)
        losses[0].backward()
        if store:
            cc.average_gradients(model)
        found[objective, chunk] = cc.mean_over_processes(losses.detach()), {n: p.grad for n, p in model.named_parameters()}
if not cc.rank():
    torch.save(found, sys.argv[2])
if store:
    dist.destroy_process_group()
"""


def torchrun(*arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(SCRIPT).parent), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="session")
def one_and_two(tmp_path_factory):
    """Losses and gradients of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "process.py").write_text(PROCESS)
    two = torchrun(folder / "process.py", "several", folder / "2.pt")
    one = subprocess.run([sys.executable, str(folder / "process.py"), "one", str(folder / "1.pt")], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(Path(SCRIPT).parent)}, timeout=300)  # fmt: skip
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2)]


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("objective", ["clip", "siglip", "clixp", "siglixp"])
def test_two_processes_give_the_loss_and_gradients_of_one(objective, chunk, one_and_two):
    (loss, gradients), (loss2, gradients2) = (found[objective, chunk] for found in one_and_two)
    torch.testing.assert_close(loss2, loss, rtol=1e-5, atol=1e-5)
    assert gradients["image_encoder.0.weight"].abs().max() > 1e-3 and gradients["words.weight"].abs().max() > 1e-3
    for name, gradient in gradients.items():
        assert (gradient is None) == (gradients2[name] is None)
        if gradient is not None:
            torch.testing.assert_close(gradients2[name], gradient, rtol=1e-5, atol=1e-5)


def test_two_processes_train_one_model_which_one_process_resumes(tmp_path):
    common = [*SMALL, "--objective", "clixp", "--steps", "120"]
    assert cc.main([*common, "--out", str(tmp_path / "one")]) is None
    run = torchrun(SCRIPT, *common, "--out", tmp_path / "two")
    assert run.returncode == 0 and run.stdout.count("in 2 processes") == 1 and run.stdout.count("objective  ") == 1
    one, two = (cc.read_checkpoint(tmp_path / out / "clixp.pt") for out in ("one", "two"))
    assert sorted(os.listdir(tmp_path / "two")) == ["clixp.csv", "clixp.pt"]
    early = slice(0, 3)  # later, rounding grows
    np.testing.assert_allclose(np.array(two["log"])[early, 1:9], np.array(one["log"])[early, 1:9], rtol=1e-4, atol=1e-5)
    two["result"], two["log"] = None, two["log"][:-1]  # as if stopped
    torch.save(two, tmp_path / "two" / "clixp.pt")
    cc.main([*common, "--out", str(tmp_path / "two"), "--resume"])
    assert cc.read_checkpoint(tmp_path / "two" / "clixp.pt")["log"][-1][0] == 120


@pytest.mark.parametrize("arguments, message", [
    (["--batch-size", "33"], "--batch-size 33: it must be a multiple of the number of processes, 2"),
    (["--steps", "0"], "--steps 0: it must lie between"), (["--lr", "1e9"], "the loss is no longer finite")])  # fmt: skip
def test_of_several_processes_one_tells_what_is_wrong(arguments, message, tmp_path):
    run = torchrun(SCRIPT, *SMALL, "--out", tmp_path, *arguments)
    lines = [line for line in run.stderr.splitlines() if "contextclip: " in line]
    assert run.returncode and len(lines) == 1 and message in lines[0]


def test_a_process_that_dies_ends_the_run_with_one_message(tmp_path):
    (tmp_path / "run.py").write_text("""
import os, contextclip as cc
original, calls = cc.training_step, []
def training_step(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 7:
        raise RuntimeError("out of memory")
    return original(*args)
cc.training_step = training_step
cc.main()
""")
    run = torchrun(tmp_path / "run.py", *SMALL, "--steps", "1000", "--out", tmp_path / "out")
    lines = [line for line in run.stderr.splitlines() if "contextclip: " in line]
    assert run.returncode and len(lines) == 1 and lines[0].endswith("contextclip: process 1: out of memory")
    assert not list((tmp_path / "out").glob("*"))


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["cnn", "vit"])
def test_an_embedding_depends_on_its_own_input_alone(encoder):
    model = make_model(encoder=encoder)
    images, tokens = torch.rand(4, 1, 32, 32), torch.tensor([[2, 3, 0], [2, 0, 0], [2, 3, 4], [1, 0, 0]])
    v, t = model(images, tokens)
    assert v.shape == t.shape == (4, 32)
    torch.testing.assert_close(model.encode_image(images[:1]), v[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens[1:2, :1]), t[1:2], rtol=1e-4, atol=1e-5)  # nor on padding
    torch.testing.assert_close(model.encode_image(images, normalize=True).norm(dim=1), torch.ones(4))


def test_one_seed_gives_all_objectives_the_same_encoders():
    states = []
    for objective in ("clip", "siglip", "clixp", "siglixp"):
        torch.manual_seed(3)
        states.append({k: p for k, p in make_model(objective=objective).state_dict().items() if p.ndim})
    assert all(torch.equal(s[k], states[0][k]) for s in states for k in states[0])


def test_weight_decay_spares_temperatures_biases_and_gains():
    model = make_model()
    decayed, spared = (group["params"] for group in cc.make_optimizer(model, model.settings).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    assert {"log_tau_1", "log_tau_2", "log_tau_ctx", "b_1", "b_2"} <= {names[id(p)] for p in spared}
    assert all(names[id(p)].endswith(("weight", "positions")) for p in decayed)


# ---- the data -------------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip(atlas):
    words = list(atlas.vocabulary)
    assert words[:2] == ["<pad>", "<unk>"] and words[2:] == sorted(words[2:])
    captions = [atlas.names[i] for i in atlas.train.tolist()]
    tokens = cc.tokenize(captions, atlas.vocabulary)
    back = [" ".join(words[t] for t in row if t) for row in tokens.tolist()]
    assert back == [" ".join(cc.split_words(c)) for c in captions] and "<unk>" not in " ".join(back)
    odd = cc.tokenize(["Latin SMALL letter zzz", "", "a " * 99], atlas.vocabulary)
    assert odd.shape == (3, cc.MAX_WORDS)
    assert odd[0, :5].tolist() == [atlas.vocabulary[w] for w in ("latin", "small", "letter")] + [1, 0]
    assert odd[1, :2].tolist() == [1, 0]


def test_splits_are_disjoint(atlas):
    groups = list(cc.FACES.values())
    assert len({face for group in groups for face in group}) == sum(map(len, groups))
    assert all(face.startswith("STIXGeneral") for face in cc.FACES["test"])
    assert not any(face.startswith("STIX") for face in cc.FACES["train"])
    ranges = [set(range(f, f + n)) for g in cc.FACES for f, n in atlas.rows[g].tolist()]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == len(atlas.glyphs)  # no bitmap serves two groups

    full = cc.Atlas("cpu", cc.Settings(characters=0))
    splits = [set(full.train.tolist()), *(set(m.tolist()) for m in full.validation.values())]
    assert all(splits) and sum(map(len, splits)) == len(set().union(*splits))
    trained = {full.names[i] for i in full.train.tolist()}
    for script in "cyrillic armenian georgian hebrew arabic lao lisu canadian braille box playing domino hexagram".split():
        assert sum(name.startswith(script) for name in full.names) >= 40
        assert not any(name.startswith(script) for name in trained)

    pairs = {re.sub("capital|small", "", name) for name in trained if " with " in name}
    for i in full.validation["combinations"].tolist():  # known letter, known diacritic, never together in either case
        name = full.names[i]
        assert re.sub("capital|small", "", name) not in pairs
        assert all(word in full.vocabulary for word in cc.split_words(name))
    held_out = [c for c in map(chr, range(0xC0, 0x1F00)) if unicodedata.name(c, "").startswith("LATIN") and cc.split_of(c) == "test"]
    assert len(held_out) > 100 and not trained & {unicodedata.name(c).lower() for c in held_out}


def test_atlas_draws_what_its_names_say(atlas):
    i = atlas.index["A"]
    assert atlas.names[i] == "latin capital letter a"
    assert [int(atlas.rows[g][i, 1]) for g in cc.FACES] == [len(cc.FACES[g]) for g in cc.FACES]
    first, count = atlas.rows["train"][atlas.index["a"]].tolist()
    accented, _ = atlas.rows["train"][atlas.index["à"]].tolist()
    assert (atlas.glyphs[accented : accented + count].float() - atlas.glyphs[first : first + count].float()).abs().mean() < 10
    assert atlas.glyphs.flatten(1).amax(1).min() > 64  # nothing blank


def test_glyphs_fit_their_bitmaps(atlas):
    """What the caption says must be on the card: no descender is cut off, and diacritics only where there are two."""

    def touches(i, row):
        first, count = atlas.rows["train"][i].tolist()
        return (atlas.glyphs[first : first + count, row].amax(1) > 100).float().mean() > 0.3

    assert not any(touches(i, -1) for i in atlas.train.tolist())
    assert not any(touches(i, 0) for i in atlas.train.tolist() if " and " not in atlas.names[i] and "hook above" not in atlas.names[i])


def test_cards_are_deterministic_under_a_seed_and_vary_otherwise(atlas):
    def draw(seed, group="train"):
        return cc.draw_cards(atlas, atlas.train[:64], group, torch.Generator().manual_seed(seed))

    (a, n), (b, m), (c, k) = draw(0), draw(0), draw(1)
    assert torch.equal(a, b) and torch.equal(n, m)
    assert not torch.equal(a, c) and not torch.equal(n, k)
    assert a.shape == (64, 1, 32, 32) and a.dtype == torch.float32 and -0.6 < a.min() and a.max() < 1.6
    same_character = cc.draw_cards(atlas, atlas.train[:1].repeat(64), "train", torch.Generator().manual_seed(0))
    assert len(same_character[1].unique(dim=0)) > 55 and len(same_character[0].flatten(1).unique(dim=0)) == 64
    assert set(n.unique().tolist()) == set(range(10))


def test_captions_name_character_and_number(atlas):
    words = list(atlas.vocabulary)
    for share in (0.0, 0.5, 1.0):
        settings = cc.Settings(batch_size=400, number_share=share)
        _, tokens = atlas.draw_batch(settings, torch.Generator().manual_seed(0))
        captions = [" ".join(words[t] for t in row if t) for row in tokens.tolist()]
        named = [c for c in captions if re.search(r" number( (%s)){3}$" % "|".join(cc.NUMERALS), c)]
        assert abs(len(named) / 400 - share) < 0.08 and (share == 0.5 or len(named) == 400 * share)
        names = {" ".join(cc.split_words(atlas.names[i])) for i in atlas.train.tolist()}
        assert {c.split(" number ")[0] if c in named else c for c in captions} <= names


def test_the_number_on_the_card_is_the_one_returned(atlas):
    """Cards of one character differ least, on average, in the place of equal digits."""
    images, numbers = cc.draw_cards(atlas, atlas.train[:1].repeat(3000), "train", torch.Generator().manual_seed(0))
    ink = (images - images.flatten(1).median(1).values[:, None, None, None]).abs()[:, 0, 23:, 12:20].flatten(1)  # middle digit
    means = torch.stack([ink[numbers[:, 1] == d].mean(0) for d in range(10)])
    halves = torch.stack([ink[1500:][numbers[1500:, 1] == d].mean(0) for d in range(10)])
    centred = [torch.nn.functional.normalize(m - m.mean(0), dim=1) for m in (means, halves)]
    assert (centred[0] @ centred[1].T).argmax(1).tolist() == list(range(10))


# ---- training -------------------------------------------------------------------------------------------------------


def run(*arguments, cwd=None, **environment):
    """The script as a user runs it -> completed process with text output."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment, timeout=300)


def train(atlas, out, objective="clixp", **changes):
    out.mkdir(parents=True, exist_ok=True)
    extra = {k: changes.pop(k) for k in ("resume", "init", "compile") if k in changes}
    settings = {"steps": 30, "batch_size": 32, "width": 32, "precision": "float32"} | changes
    return cc.train(cc.Settings(objective=objective, **settings), atlas, out, **extra)


def weights(path):
    return cc.read_checkpoint(path)["model"]


@pytest.mark.parametrize("objective", ["clip", "siglip", "clixp", "siglixp"])
def test_a_short_run_lowers_the_loss(atlas, tmp_path, objective):
    chance = cc.chance_loss(cc.Settings(objective, batch_size=64))
    steps = 500 if "sig" in objective else 200  # the sigmoid loss starts slowly
    result = train(atlas, tmp_path, objective, steps=steps, batch_size=64, width=64, number_share=0.0)
    log = list(csv.DictReader(open(tmp_path / f"{objective}.csv")))
    assert [int(row["step"]) for row in log] == list(range(10, steps + 1, 10))
    first, last = (float(log[i]["plain_loss"]) for i in (0, -1))
    assert first == pytest.approx(chance, rel=0.2) and last < chance - 0.1  # below what guessing gives
    assert float(log[-1]["loss"]) == pytest.approx(result["loss"])
    assert (float(log[-1]["context_loss"]) > 0) == objective.endswith("xp")
    assert result[16] > result[1] > 3 and 0 <= result["zero-shot"] <= 100  # guessing: 2


def test_base_and_context_runs_see_the_same_batches(atlas, tmp_path, monkeypatch):
    seen, draw = [], cc.Atlas.draw_batch
    monkeypatch.setattr(cc.Atlas, "draw_batch", lambda *a: seen.append(draw(*a)) or seen[-1])
    for objective in ("clip", "clixp"):
        train(atlas, tmp_path, objective, steps=4)
    assert len(seen) == 8
    for a, b in zip(seen[:4], seen[4:]):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_alpha_one_is_the_base_run(atlas, tmp_path):
    """Same weights, same batches: with no weight on the context loss, the encoders end bit for bit as the base's."""
    train(atlas, tmp_path, "clip", steps=5)
    train(atlas, tmp_path, "clixp", steps=5, alpha=1.0)
    a, b = weights(tmp_path / "clip.pt"), weights(tmp_path / "clixp.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_resumed_is_bit_for_bit_never_interrupted(atlas, tmp_path, monkeypatch):
    train(atlas, tmp_path / "whole", steps=40)
    monkeypatch.setattr(cc, "SAVE_EVERY", 10)
    step, done = cc.training_step, []

    def killed(*args):
        done.append(1)
        if len(done) == 27:
            raise KeyError("killed")
        return step(*args)

    monkeypatch.setattr(cc, "training_step", killed)
    with pytest.raises(KeyError):
        train(atlas, tmp_path / "parts", steps=40)
    assert cc.read_checkpoint(tmp_path / "parts/clixp.pt")["log"][-1][0] == 20
    result = train(atlas, tmp_path / "parts", steps=40, resume=True)
    assert len(done) == 27 + 20
    whole, parts = (cc.read_checkpoint(tmp_path / d / "clixp.pt") for d in ("whole", "parts"))
    assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])
    for a, b in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(whole["random"]["batches"], parts["random"]["batches"])
    assert [row[:-1] for row in whole["log"]] == [row[:-1] for row in parts["log"]]  # all but the speed
    assert train(atlas, tmp_path / "parts", steps=40, resume=True) == result  # a finished run stays as it is


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, number):
    arguments = [*SMALL, "--steps", "100000", "--objective", "clip", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert "chance-level" in process.stdout.readline()
    time.sleep(2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"python {SCRIPT} {' '.join(arguments)} --resume" in errors and "Traceback" not in errors
    saved = cc.read_checkpoint(tmp_path / "clip.pt")
    assert saved["log"][-1][0] >= 10 and saved["result"] is None


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(cc, "SAVE_EVERY", 10)
    draw, drawn = cc.Atlas.draw_batch, []

    def broken(*args):
        images, tokens = draw(*args)
        drawn.append(1)
        return images * (math.nan if len(drawn) > 15 else 1), tokens

    monkeypatch.setattr(cc.Atlas, "draw_batch", broken)
    with pytest.raises(cc.UserError, match=r"no longer finite at step 20: .*clixp.pt keeps the last good step"):
        train(atlas, tmp_path)
    saved = cc.read_checkpoint(tmp_path / "clixp.pt")
    assert saved["log"][-1][0] == 10 and all(p.isfinite().all() for p in saved["model"].values())


def test_a_failed_save_keeps_the_last_checkpoint(atlas, tmp_path, monkeypatch):
    train(atlas, tmp_path, steps=5)
    before = (tmp_path / "clixp.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(cc.UserError, match="cannot write .*clixp.pt .*No space left"):
        train(atlas, tmp_path, steps=6)
    assert (tmp_path / "clixp.pt.bak").read_bytes() == before  # and an earlier run is never lost
    assert not list(tmp_path.glob("*.tmp"))


def test_it_warns_when_the_loss_stays_at_chance(atlas, tmp_path, capsys):
    train(atlas, tmp_path, steps=100, batch_size=8, lr=0.0)
    assert capsys.readouterr().out.count("is still at chance") == 1


def test_post_training_starts_from_the_finished_model(atlas, tmp_path):
    train(atlas, tmp_path, "clip")
    trained = weights(tmp_path / "clip.pt")
    finished = cc.read_checkpoint(tmp_path / "clip.pt")
    train(atlas, tmp_path, "clixp", init=finished, lr=0.0, steps=1)
    continued = weights(tmp_path / "clixp.pt")
    assert all(torch.equal(trained[k], continued[k]) for k in trained if "2" not in k.split("_")[-1] and k != "log_tau_ctx")
    assert continued["log_tau_2"] == trained["log_tau_1"] != pytest.approx(math.log(cc.Settings.tau), abs=1e-6)
    for changes in ({"objective": "siglixp"}, {"width": 64}, {"encoder": "vit"}):
        with pytest.raises(cc.UserError, match="encoder, width, image size, vocabulary or kind of loss is not this run's"):
            train(atlas, tmp_path / "other", init=finished, **changes)


class CountWaits(TorchDispatchMode):
    """Counts the operators that would make the host wait for a GPU: reading a number, or a shape that depends on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen += [name for name in self.WAITS if f"aten.{name}" in str(operator) or f"aten._{name}" in str(operator)]
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["clip", "siglixp"])
@pytest.mark.parametrize("encoder", ["cnn", "vit"])
def test_a_training_step_never_waits_for_the_device(atlas, objective, encoder):
    settings = cc.Settings(objective, encoder, batch_size=16, width=32)
    model = cc.ContextCLIP(settings, atlas.vocabulary)
    optimizer, generator = cc.make_optimizer(model, settings), torch.Generator().manual_seed(0)
    with CountWaits() as waits:
        for _ in range(2):
            images, tokens = atlas.draw_batch(settings, generator)
            cc.training_step(model, model, optimizer, images, tokens, 1e-3, bf16=True)
    assert waits.seen == []
    with CountWaits() as waits:  # the counter counts
        images.sum().item()
    assert waits.seen == ["_local_scalar_dense"]


def test_validation_uses_its_own_cards_and_nests_its_supports(atlas, monkeypatch):
    drawn, draw = [], cc.draw_cards
    monkeypatch.setattr(cc, "draw_cards", lambda *a: drawn.append(a) or draw(*a))
    torch.manual_seed(0)
    model = cc.ContextCLIP(cc.Settings(width=32), atlas.vocabulary).eval()
    one, two = atlas.validate(model, shots=(1, 4, 16)), atlas.validate(model, shots=(4, 16))
    assert {a[2] for a in drawn} == {"validation"}
    assert not {i for a in drawn for i in a[1].tolist()} & set(atlas.train.tolist())
    assert one[4] == two[4] and one[16] == two[16]  # the same episode with and without the 1-shot column
    assert one[16] == pytest.approx(np.mean([t[16] for t in one["tasks"].values()]))


def test_prototypes_by_hand():
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    p = cc.prototypes(support, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(p, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_default_command_trains_both_and_prints_the_table(tmp_path):
    done = run("--dry-run", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"clip: cpu, \w+, [\d,]+ parameters, \d+ characters, 20 steps of 64; chance-level loss 4.159", done.stdout)
    for objective in ("clip", "clixp"):
        assert re.search(rf"^ *{objective}( +[\d.,]+){{7}}$", done.stdout, re.M)
        assert (tmp_path / f"runs/dry-run/{objective}.pt").exists() and (tmp_path / f"runs/dry-run/{objective}.csv").exists()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["dry-run"]


def test_compile_falls_back_to_the_plain_model(tmp_path):
    done = run(*SMALL, "--objective", "clip", "--compile", "--out", tmp_path, CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clip.pt").exists()


BAD = {
    "objective": (["--objective", "clop"], "--objective clop: choose from clip, siglip, clixp, siglixp"),
    "encoder": (["--encoder", "rnn"], "--encoder rnn"),
    "batch": (["--batch-size", "1"], "--batch-size 1: it must lie between 2"),
    "alpha above": (["--alpha", "1.5"], "--alpha 1.5: it must lie between 0 and 1"),
    "alpha below": (["--alpha", "-0.1"], "--alpha -0.1"),
    "alpha nan": (["--alpha", "nan"], "--alpha nan"),
    "not a number": (["--steps", "many"], "invalid int value: 'many'"),
    "width": (["--width", "50"], "--width 50: it must be a multiple of 32"),
    "flag": (["--bogus"], "unrecognized arguments: --bogus"),
    "cuda": (["--device", "cuda"], "--device cuda: there is no such device here"),
    "device": (["--device", "toaster"], "--device toaster: there is no such device here"),
    "out": (["--out", "{tmp}/file/runs"], "/file/runs cannot be written: Not a directory"),
    "distortion": (["--distortion", "2"], "--distortion 2.0: it must lie between 0 and 1"),
    "tau": (["--tau", "1000"], "--tau 1000.0: it must lie between 1.0 and 100.0"),
    "init missing": (["--init", "{tmp}/none.pt"], "there is no checkpoint"),
    "init foreign": (["--init", "{tmp}/file"], "file is not a checkpoint of contextclip"),
    "init other version": (["--init", "{tmp}/old.pt"], "old.pt was written by another version of contextclip (contextclip-0"),
    "resume foreign": (["--resume", "--out", "{tmp}"], "clip.pt is not a checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(case, tmp_path, capsys, monkeypatch):
    if "cuda" in case and torch.cuda.is_available():
        pytest.skip("CUDA works here")
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    (tmp_path / "file").write_text("not a checkpoint")
    (tmp_path / "clip.pt").write_text("nor this")
    torch.save({"format": "contextclip-0"}, tmp_path / "old.pt")
    with pytest.raises(SystemExit) as exit:
        cc.main([a.format(tmp=tmp_path) for a in arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "drawing glyphs" not in line]
    assert exit.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert (tmp_path / "clip.pt").read_text() == "nor this"


def test_resume_with_other_settings_is_refused(atlas, tmp_path):
    train(atlas, tmp_path, lr=1e-3)
    with pytest.raises(cc.UserError, match="clixp.pt was made with lr = 0.001, this run has 0.004"):
        train(atlas, tmp_path, lr=4e-3, resume=True)


# ---- as a library, as the README shows it ---------------------------------------------------------------------------


def test_encoding_images_and_captions_with_a_trained_checkpoint(atlas, tmp_path):
    train(atlas, tmp_path)
    card = cc.draw_cards(atlas, atlas.train[:1], "train", torch.Generator().manual_seed(0))[0][0, 0]
    Image.fromarray((255 * card.clamp(0, 1)).byte().numpy()).resize((64, 48)).convert("RGB").save(tmp_path / "a.png")
    model = cc.load(tmp_path / "clixp.pt")
    images = torch.stack([cc.preprocess(cc.Settings())(Image.open(path)) for path in [tmp_path / "a.png"] * 2])
    x = model.encode_image(images, normalize=True)
    t = model.encode_text(cc.tokenize(["latin small letter a", "an unknown thing"], model.vocabulary), normalize=True)
    assert (x @ t.T).shape == (2, 2) and not x.requires_grad
    torch.testing.assert_close(x.norm(dim=1), torch.ones(2))


# ---- fewshot.py: classifiers against naive loops over queries -------------------------------------------------------

HYPER = {"prototypes + text": {"c": 3.0}, "Tip-Adapter": {"a": 2.0, "b": 4.0}, "Tip-X": {"a": 2.0, "b": 4.0, "g": 1.5, "temp": 0.3},
         "plurality vote": {"k": 5}, "softmax vote": {"k": 4}, "rank vote": {"k": 6}, "linear probe": {"l2": 0.05},
         "Tip-Adapter-F": {"a": 2.0, "b": 4.0, "lr": 0.01, "steps": 3}}  # fmt: skip


def episode(shots=3, classes=4, queries=7, d=5, episodes=2, seed=0, dtype=torch.float64):
    """query, support, labels, text, scale as `accuracies` gives them to a classifier."""
    g = torch.Generator().manual_seed(seed)
    query, support, text = (normalize(torch.randn(*shape, d, generator=g, dtype=dtype), dim=-1)
                            for shape in ((episodes, queries), (episodes, shots * classes), (classes,)))  # fmt: skip
    labels = torch.arange(classes).repeat(shots)
    return query, support, labels, text, fs.text_scale(support, labels, text, 10.0)


def naive_vote(x, support, labels, classes, k, weight):
    """Votes of one query: Python's own sort, one neighbour at a time."""
    cosines = [float(x @ s) for s in support]
    nearest, scores = sorted(range(len(support)), key=lambda j: -cosines[j])[:k], [0.0] * classes
    for rank, j in enumerate(nearest):
        scores[labels[j]] += weight(cosines[j], rank, len(nearest))
    return scores


def naive_scores(method, x, support, labels, text, scale, h):
    """Scores of one query x (d,) in one episode, written out."""
    C, S = len(text), len(support)
    by_class = [[support[j] for j in range(S) if labels[j] == c] for c in range(C)]
    zero = [float(x @ t) for t in text]
    if method == "zero-shot":
        return zero
    if method.startswith("prototypes"):
        scores = []
        for c in range(C):
            mean = sum(by_class[c]) / len(by_class[c])
            p = float(x @ mean / mean.square().sum().sqrt())
            w = h["c"] / (h["c"] + scale) if h else 1.0
            scores.append((1 - w) * zero[c] + w * p)
        return scores
    if method.startswith("Tip"):
        scores = [scale * zero[c] + h["a"] * sum(math.exp(-h["b"] * (1 - float(x @ s))) for s in by_class[c]) for c in range(C)]
        if method == "Tip-X":
            p = [math.exp(float(x @ t) / h["temp"]) for t in text]
            p = [value / sum(p) for value in p]
            minus_kl = []
            for s in support:
                q = [math.exp(float(s @ t) / h["temp"]) for t in text]
                minus_kl.append(-sum(a * math.log(a / (b / sum(q))) for a, b in zip(p, q)))
            cosines = [float(x @ s) for s in support]
            low, high = min(minus_kl), max(minus_kl)
            for j in range(S):
                share = (minus_kl[j] - low) / (high - low)
                scores[labels[j]] += h["g"] * (min(cosines) + share * (max(cosines) - min(cosines)))
        return scores
    weight = {"plurality vote": lambda cos, rank, k: 1 + (k - rank) / (k * (k + 1)),
              "softmax vote": lambda cos, rank, k: math.exp(cos / 0.07), "rank vote": lambda cos, rank, k: 1 / (2 + rank)}[method]  # fmt: skip
    return naive_vote(x, support, labels, C, h["k"], weight)


def naive_tip_adapter_f(query, support, labels, text, scale, h):
    """One episode: every support image is left out of the cache that classifies it, one after the other."""
    keys = support.clone().requires_grad_()
    optimizer = torch.optim.AdamW([keys], lr=h["lr"], eps=1e-4)

    def scores(x, members):
        rows = [sum((torch.exp(-h["b"] * (1 - x @ keys[j])) for j in members if labels[j] == c), 0 * keys.sum()) for c in range(len(text))]
        return scale * (text @ x) + h["a"] * torch.stack(rows)

    for _ in range(h["steps"]):
        loss = sum(-scores(support[i], [j for j in range(len(support)) if j != i]).log_softmax(0)[labels[i]] for i in range(len(support)))
        optimizer.zero_grad()
        (loss / len(support)).backward()
        optimizer.step()
    return torch.stack([scores(x, range(len(support))) for x in query]).detach()


def naive_linear_probe(query, support, labels, text, scale, h):
    """One episode: plain gradient descent, long enough."""
    W, c = torch.zeros(len(text), support.shape[1], dtype=support.dtype), torch.zeros(len(text), dtype=support.dtype)
    target = torch.eye(len(text), dtype=support.dtype)[labels]
    for _ in range(4000):
        error = ((support @ W.T + c).softmax(1) - target) / len(support)
        W, c = W - 2.0 * (error.T @ support + h["l2"] * W), c - 2.0 * error.sum(0)
    return query @ W.T + c


def reference(method, query, support, labels, text, scale, h):
    """Scores of all episodes, by loops."""
    rows = []
    for x, s, tau in zip(query, support, scale.flatten().tolist()):
        if method in fs.OPTIMISED:
            function = naive_linear_probe if method == "linear probe" else naive_tip_adapter_f
            rows.append(function(x, s, labels, text, tau, h))
        else:
            rows.append(torch.tensor([naive_scores(method, q, s, labels.tolist(), text, tau, h) for q in x], dtype=query.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("method", fs.CLASSIFIERS)
@pytest.mark.parametrize("shots", [1, 3])
def test_classifiers_equal_naive_loops(method, shots):
    e, h = episode(shots), HYPER.get(method, {})
    tolerance = 1e-3 if method == "linear probe" else 1e-9
    torch.testing.assert_close(fs.CLASSIFIERS[method](*e, **h), reference(method, *e, h), rtol=tolerance, atol=tolerance)


def test_text_scale_equals_a_loop_and_is_0_for_captions_that_say_nothing():
    _, support, labels, text, scale = episode(shots=5)
    for s, chosen in zip(support, scale.flatten().tolist()):
        def likelihood(tau):
            return sum(float((tau * text @ x).log_softmax(0)[label]) for x, label in zip(s, labels))
        assert chosen == max([0, *(10.0 * 2.0**i for i in range(-6, 1))], key=likelihood)
    assert fs.text_scale(text[None], torch.arange(4), text.roll(1, 0), 10.0).item() == 0
    assert fs.text_scale(text[None], torch.arange(4), text, 10.0).item() == 10


def test_classifiers_by_hand():
    x, labels, text = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 0, 1]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    scale, half = torch.tensor([[2.0]]), 0.5**0.5

    def scores(method, **h):
        return fs.CLASSIFIERS[method](x, support, labels, text, scale, **h)[0].tolist()

    assert scores("zero-shot") == [0, 1]
    assert scores("prototypes") == pytest.approx([half, -half])  # the means (1/2, 1/2) and (-1/2, 1/2)
    assert scores("prototypes + text", c=6.0) == pytest.approx([0.75 * half, 0.25 - 0.75 * half])
    e = math.exp(-1)  # b = 1: affinities 1, 1/e, 1/e, 1/e^2
    assert scores("Tip-Adapter", a=3.0, b=1.0) == pytest.approx([3 * (1 + e), 2 + 3 * (e + e * e)])
    assert scores("plurality vote", k=1) == [1.5, 0]
    assert scores("softmax vote", k=1) == pytest.approx([math.exp(1 / 0.07), 0])
    assert scores("rank vote", k=4) == pytest.approx([1 / 2 + 1 / 3, 1 / 4 + 1 / 5], abs=0.1)  # ranks 1 and 2 are a tie


def test_of_equally_many_votes_the_nearer_ones_win():
    support = normalize(torch.tensor([[1.0, 0.5], [1.0, 0.1], [1.0, 0.6], [1.0, 0.9]]), dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    scores = fs.plurality_vote(torch.tensor([[1.0, 0.0]]), support, labels, torch.eye(2), None, k=4)
    assert scores[0, 1] > scores[0, 0] and int(scores.floor().sum()) == 4  # two votes each; ranks 0, 2 against 1, 3
    same = torch.tensor([[1.0, 0.0]] * 2)
    assert fs.prototypes(same[:1], same, torch.tensor([0, 1]), torch.eye(2), None).argmax(-1) == 0  # equal scores: the first


@pytest.mark.parametrize("method", fs.CLASSIFIERS)
def test_one_shot_one_class_and_more_neighbours_than_support(method):
    h = HYPER.get(method, {}) | ({"k": 100} if "vote" in method else {})
    for shots, classes in ((1, 1), (1, 3), (2, 1)):
        scores = fs.CLASSIFIERS[method](*episode(shots, classes), **h)
        assert scores.shape == (2, 7, classes) and scores.isfinite().all()


@pytest.mark.parametrize("method", fs.CLASSIFIERS)
def test_permuting_the_classes_permutes_the_scores(method):
    query, support, labels, text, scale = episode()
    order = torch.tensor([2, 0, 3, 1])  # class c is called order[c]
    scores = fs.CLASSIFIERS[method](query, support, labels, text, scale, **HYPER.get(method, {}))
    permuted = fs.CLASSIFIERS[method](query, support, order[labels], text[order.argsort()], scale, **HYPER.get(method, {}))
    torch.testing.assert_close(permuted[..., order], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", fs.CLASSIFIERS)
def test_random_embeddings_give_chance_and_separable_ones_100_percent(method):
    C, shots, queries, g = 10, 4, 100, torch.Generator().manual_seed(0)
    h = HYPER.get(method, {}) | ({"steps": 3} if method == "Tip-Adapter-F" else {})
    noise = [normalize(torch.randn(2, n * C, 32, generator=g), dim=-1) for n in (queries, shots)]
    text = normalize(torch.randn(C, 32, generator=g), dim=-1)
    assert abs(fs.accuracies(method, fs.episodes((*noise, text, 10.0), shots), h).mean().item() - 10) < 3
    centres = normalize(torch.randn(C, 32, generator=g), dim=-1)
    clean = [normalize(centres.repeat(n, 1) + 0.02 * torch.randn(2, n * C, 32, generator=g), dim=-1) for n in (queries, shots)]
    assert fs.accuracies(method, fs.episodes((*clean, centres, 10.0), shots), h).tolist() == [100, 100]


def test_batched_classifiers_are_faster_than_loops_over_queries():
    """Prints the ratio: python -m pytest -s -k faster. Ten classifiers, 8 shots of 20 classes, 2 seeds, 240 queries, d =
    128; the reference takes one query after the other, and trains the optimised classifiers one seed after the other."""
    e, seconds = episode(8, 20, 240, 128, dtype=torch.float32), []

    def loop(method, h):
        if method not in fs.OPTIMISED:
            return reference(method, *e, h)
        query, support, labels, text, scale = e
        return [fs.CLASSIFIERS[method](*one, labels, text, tau, **h) for *one, tau in zip(query, support, scale)]

    for function in (lambda method, h: fs.CLASSIFIERS[method](*e, **h), loop):
        start = time.perf_counter()
        for method in fs.CLASSIFIERS:
            function(method, HYPER.get(method, {}))
        seconds.append(time.perf_counter() - start)
    print(f"\nbatched {seconds[0]:.2f} s, loops {seconds[1]:.2f} s: {seconds[1] / seconds[0]:.0f} times as long")
    assert seconds[1] > 2 * seconds[0]


# ---- fewshot.py: tasks and protocol ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with clip.pt and clixp.pt, hardly trained."""
    out = tmp_path_factory.mktemp("runs")
    cc.main([*SMALL, "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images: three classes of ten plain grey ones, all different."""
    folder = tmp_path_factory.mktemp("pictures")
    for c, name in enumerate(["3", "red_fox", "0 - zero"]):
        (folder / name).mkdir()
        for i in range(10):
            Image.new("L", (32, 32), 20 * i + 5 * c).save(folder / name / f"{i}.png")
    return folder


def test_there_are_21_tasks_in_three_groups(atlas):
    tasks = {task.name: task for task in fs.card_tasks(atlas)}
    assert len(tasks) == 21 and {task.group for task in tasks.values()} == {"seen", "combined", "unseen"}
    assert all(10 <= len(task.captions) <= fs.MOST for task in tasks.values())
    names = {group: {c[0].split(", number")[0] for t in tasks.values() if t.group == group for c in t.captions} for group in ("seen", "combined", "unseen")}
    trained, validated = {atlas.names[i] for i in atlas.train}, {atlas.names[i] for m in atlas.validation.values() for i in m}
    assert names["seen"] <= trained and not (names["combined"] | names["unseen"]) & (trained | validated)
    assert all(set(cc.split_words(name)) <= atlas.vocabulary.keys() and " with " in name for name in names["combined"])
    assert sum(len(task.captions) for task in tasks.values()) == len(set().union(*names.values()))  # no class twice


def test_tasks_draw_in_typefaces_of_their_own(atlas, monkeypatch):
    used = []
    monkeypatch.setattr(cc, "draw_cards", lambda a, members, group, g: (used.append(group), (torch.zeros(len(members), 1, 32, 32), 0))[1])
    for task in fs.card_tasks(atlas):
        task.draw(0, 1, 1)
        assert set(used) == {"train" if task.group == "unseen" else "test"}
        used.clear()


def test_supports_are_nested_and_queries_the_same_for_all_shots(atlas):
    task = fs.card_tasks(atlas, ["digits"])[0]
    few, some, many = (task.draw(3, shots, 5) for shots in (2, 16, 40))
    assert few.shape == (7, 10, 1, 32, 32) and many.shape[0] == 45
    assert torch.equal(few, some[:7]) and torch.equal(some, many[:21])
    assert many.flatten(0, 1).flatten(1).unique(dim=0).shape[0] == 450  # no card twice: queries are in no support
    assert not torch.equal(few, task.draw(4, 2, 5)) and not torch.equal(few[:5], few[2:])


def test_own_images_are_nested_disjoint_and_captioned(pictures):
    def take(shots, seeds=(0, 1)):
        return fs.image_task(str(pictures), ["a {}", "{}"], None, seeds, shots, 4, "cpu")

    few, many = take(2), take(6)
    assert few.captions == [["a zero", "zero"], ["a three", "three"], ["a red fox", "red fox"]]
    for seed in (0, 1):
        values = (255 * many.draw(seed, 6, 4)[..., 0, 0, 0]).round().int()  # (queries + shots, C), what was drawn in the files
        assert torch.equal(few.draw(seed, 2, 4)[..., 0, 0, 0], many.draw(seed, 6, 4)[:6, ..., 0, 0, 0])
        for c, offset in enumerate((10, 0, 5)):
            assert sorted(values[:, c].tolist()) == [20 * i + offset for i in range(10)]  # its own images, each once
    assert not torch.equal(many.draw(0), many.draw(1))


def test_embeddings_and_accuracies_match_one_image_at_a_time(atlas, trained):
    model, task = cc.load(trained / "clip.pt"), fs.card_task(atlas, "x", "seen", [atlas.index[c] for c in "ABC"], "test")
    query, support, text, _ = fs.embed({"m": model}, task, [5, 6], shots=2, queries=4)["m"]
    assert query.shape == (2, 12, 32) and support.shape == (2, 6, 32) and text.shape == (3, 32)
    images = task.draw(6, 2, 4)
    torch.testing.assert_close(query[1, 3 * 2 + 1], model.encode_image(images[2, 1][None], True)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(support[1, 3 * 1 + 2], model.encode_image(images[5, 2][None], True)[0], atol=1e-5, rtol=0)
    own = query.unflatten(1, (4, 3))[:, :2].flatten(1, 2)  # queries that are in the support
    assert fs.accuracies("plurality vote", fs.episodes((own, own, text, 10.0), 2), {"k": 1}).tolist() == [100, 100]


def test_no_choice_depends_on_the_labels_of_the_queries(atlas, trained):
    models = {"clip": cc.load(trained / "clip.pt")}
    def task(faces, roll=0):
        members = [atlas.index[c] for c in "ABCDEFGH"]
        honest = fs.card_task(atlas, "x", "seen", members, faces)
        def draw(seed, shots, queries):
            images = honest.draw(seed, shots, queries)
            return torch.cat([images[:queries].roll(roll, 1), images[queries:]])  # the queries' labels are wrong
        return dataclasses.replace(honest, draw=draw)

    validation, methods = [task("validation")], ["prototypes", "Tip-Adapter", "rank vote", "linear probe"]
    results = [fs.evaluate(models, [task("test", roll)], validation, methods, [1, 4], [0, 1], 4) for roll in (0, 1)]
    assert results[0][1] == results[1][1] and results[0][0] != results[1][0]
    assert fs.evaluate(models, [task("test")], [task("validation", 1)], methods, [1, 4], [0, 1], 4)[1] != results[0][1]


def test_hyperparameters_are_the_best_of_their_grid(atlas, trained):
    model = cc.load(trained / "clip.pt")
    embedded = [fs.embed({"m": model}, fs.card_task(atlas, n, "validation", m[:8], "validation"), range(2), 4, 6)
                for n, m in atlas.validation.items()]  # fmt: skip
    weights = [1.0, 0.5, 0.25, 0.1]
    chosen = fs.find_hyperparameters(embedded, weights, {"Tip-X", "rank vote"}, [4])
    assert list(chosen) == ["Tip-Adapter", "Tip-X", "rank vote"]  # Tip-X keeps Tip-Adapter's a and b
    for method in chosen:
        point = chosen[method][4]
        def mean(h):
            return sum(w * fs.accuracies(method, fs.episodes(e, 4), h).mean().item() for w, task in zip(weights, embedded) for e in task.values())
        assert all(mean(point) >= mean(point | other) for other in fs.GRIDS[method])
    assert {name: chosen["Tip-X"][4][name] for name in "ab"} == chosen["Tip-Adapter"][4]


def test_interval_of_one_factor_is_students_and_of_two_covers():
    values = np.array([[1.0, 2.0, 4.0, 5.0]])
    for v in (values, values.T):
        mean, width = fs.interval(v)
        assert mean == 3 and width == pytest.approx(3.18 * values.std(ddof=1) / 2, rel=1e-3)
    g, covered = np.random.default_rng(0), 0
    for _ in range(1000):  # tasks and seeds each have an effect of their own
        mean, width = fs.interval(g.normal(size=(21, 1)) + g.normal(size=(1, 5)) + g.normal(size=(21, 5)))
        covered += abs(mean) < width
    assert 920 < covered < 995


def test_sample_efficiency_by_hand():
    assert fs.efficiency([10, 20, 30], [20, 25, 40], [1, 2, 4]).tolist() == pytest.approx([2, 2**1.5 / 2, math.inf])
    assert fs.efficiency([10, 20, 30], [10, 20, 30], [1, 2, 4]).tolist() == [1, 1, 1]


def test_seeds_of_one_training_run_count_as_one():
    rows = [("clip", "t", "seen", "prototypes", 1, seed, float(seed)) for seed in range(6)]
    assert fs.tabulate(rows, 6)[0]["clip", "prototypes", 1].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert fs.tabulate(rows, 2)[0]["clip", "prototypes", 1].tolist() == [[0.5, 2.5, 4.5]]


# ---- fewshot.py: the command line -----------------------------------------------------------------------------------


def test_a_small_evaluation_from_end_to_end(trained, capsys):
    fs.main(["--out", str(trained), "--shots", "1", "2", "--seeds", "2", "--queries", "4", "--tasks", "digits", "Lisu", "Lao"])
    printed = capsys.readouterr().out
    with open(trained / "fewshot.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * (1 + 9 * 2) and list(rows[0]) == "model task group method shots seed accuracy".split()
    tables = printed[printed.index("zero-shot, % right"):].split("\n\n")
    for model, table in zip(("clip", "clixp"), tables[1:3]):
        for line in table.splitlines()[1:]:
            for shots, value in zip("12", line[20:].split()):
                methods = fs.SIX if line.startswith(fs.MEAN) else [line[:20].strip()]
                mean = np.mean([float(r["accuracy"]) for r in rows if r["model"] == model and r["method"] in methods and r["shots"] == shots])
                assert float(value) == pytest.approx(mean, abs=0.051)
        assert len(table.splitlines()) == 1 + 9 + 1
    assert set(json.loads((trained / "fewshot.json").read_text())[0]) == set(fs.CLASSIFIERS) - {"zero-shot"}
    for name in ("accuracy_vs_shots.png", "gain_per_task.png"):
        assert Image.open(trained / name).size[0] > 500
    for word in ("sample efficiency", "best training-free on clixp", "best optimised on clip", "clixp - clip by task"):
        assert word in printed


def test_the_same_evaluation_gives_the_same_rows(trained, tmp_path):
    command = ["--checkpoint", str(trained / "clip.pt"), "--shots", "2", "--seeds", "1", "--queries", "3", "--tasks", "Lao", "--out"]
    for name in ("a", "b"):
        fs.main([*command, str(tmp_path / name)])
    assert (tmp_path / "a" / "fewshot.csv").read_text() == (tmp_path / "b" / "fewshot.csv").read_text()


def test_own_images_on_the_command_line(trained, tmp_path, pictures, capsys):
    fs.main(["--checkpoint", *map(str, trained.glob("*.pt")), "--out", str(tmp_path), "--data", str(pictures), "--template", "digit {}",
             "--shots", "1", "4", "--queries", "3", "--seeds", "2", "--methods", "zero-shot", *fs.SIX])  # fmt: skip
    assert "clixp - clip" in capsys.readouterr().out and (tmp_path / "accuracy_vs_shots.png").exists()
    assert len((tmp_path / "fewshot.csv").read_text().splitlines()) == 1 + 2 * 2 * (1 + 2 * 6)


def test_torchvision_datasets_by_name(monkeypatch, tmp_path):
    class Pens(torchvision.datasets.VisionDataset):
        def __init__(self, root, split, **kwargs):
            assert split == "letters" and kwargs["download"] and not kwargs["train"]
            self.classes, self.labels = ["none", "a", "b"], [1, 2] * 6

        def __getitem__(self, i):
            return Image.new("RGB", (40, 20), (i, i, i)), self.labels[i]

        def __len__(self):
            return 12

    class Parent(Pens):
        def __init__(self, root, train=True, download=False):
            super().__init__(root, "letters", train=train, download=download)

    for kind in (type("Pens", (Pens, torchvision.datasets.MNIST), {"__init__": Pens.__init__}), Parent):
        monkeypatch.setattr(torchvision.datasets, "Pens", kind, raising=False)
        task = fs.image_task("Pens:letters", ["letter {}"], tmp_path, [0], 4, 2, "cpu")
        assert task.captions == [["letter a"], ["letter b"]] and task.draw(0).shape == (6, 2, 1, 32, 32)


def bad_evaluation(case, tmp_path, trained, pictures, monkeypatch):
    """Arguments of fewshot.py that must fail, and what the message must name."""
    own = ["--out", str(trained), "--data", str(tmp_path / "own"), "--shots", "2", "--queries", "2"]
    if case in ("few", "broken"):
        shutil.copytree(pictures, tmp_path / "own")
        if case == "few":
            for i in range(7):
                (tmp_path / "own" / "red_fox" / f"{i}.png").unlink()
            return own, "class red_fox has 3 images"
        for path in (tmp_path / "own" / "3").iterdir():
            path.write_bytes(path.read_bytes()[:40])
        return own, str(tmp_path / "own" / "3")
    if case == "empty":
        (tmp_path / "own").mkdir()
        return own, "Couldn't find any class folder"
    if case == "foreign":
        (tmp_path / "clip.pt").write_text("hello")
        return ["--out", str(tmp_path)], "is not a checkpoint"
    if case == "download":
        def download(self):
            raise OSError("no route to host")
        monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
        return ["--out", str(trained), "--data", "MNIST"], "cannot be downloaded or read (no route to host)"
    if case == "folders":
        shutil.copytree(trained, tmp_path / "a")
        return ["--checkpoint", str(trained / "clip.pt"), str(tmp_path / "a" / "clixp.pt"), "--out", str(tmp_path)], "different models"
    return {"none": (["--out", str(tmp_path)], "python contextclip.py trains some"),
            "missing": (["--checkpoint", str(tmp_path / "no.pt")], "no.pt"),
            "unknown": (["--out", str(trained), "--data", "MNISTY"], "neither a folder nor a dataset"),
            "function": (["--out", str(trained), "--data", "wrap_dataset_for_transforms_v2"], "neither a folder nor a dataset"),
            "template": (["--out", str(trained), "--template", "a digit"], "it needs a {}"),
            "method": (["--methods", "magic"], "--methods: invalid choice: 'magic'"),
            "task": (["--tasks", "Klingon"], "--tasks: invalid choice: 'Klingon'"),
            "shots": (["--shots", "0"], "--shots: 0 is not a whole number above 0"),
            "characters": (["--out", str(trained), "--tasks", "small + diacritic"], "too few characters"),
            "flag": (["--shot-gun", "1"], "--shot-gun")}[case]  # fmt: skip


@pytest.mark.parametrize("case", ["none", "missing", "foreign", "folders", "few", "broken", "empty", "unknown", "function", "download",
                                  "template", "method", "task", "shots", "characters", "flag"])  # fmt: skip
def test_bad_input_of_an_evaluation_is_one_line_and_exit_2(case, tmp_path, trained, pictures, capsys, monkeypatch):
    arguments, message = bad_evaluation(case, tmp_path, trained, pictures, monkeypatch)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fs.main(arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line and line.strip()]
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("fewshot: ") and message in error[0]


# ---- photographs with captions -------------------------------------------------------------------------------------------------

WORDS = ["red", "green", "blue", "grey", "dark"]
PHOTOS = ["--steps", "3", "--batch-size", "8", "--width", "32", "--precision", "float32", "--device", "cpu"]


def gradient(i, size=(90, 60)):
    """A landscape PIL image whose red grows from left to right, whose green grows downwards, whose blue is its number's."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 8 * i % 256)], -1).astype(np.uint8))


def make_photos(folder, n=30):
    """A folder as Flickr8k: captions.txt with i % 3 + 1 captions of image i, one of them with commas and quotes."""
    (folder / "Images").mkdir(parents=True)
    rows = [("image", "caption")]
    for i in range(n):
        gradient(i).save(folder / "Images" / f"{i}.png")
        rows += [(f"{i}.png", f'A {WORDS[i % 5]} dog, the "{j}th" , runs .') for j in range(i % 3 + 1)]
    with open(folder / "captions.txt", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos") / "p")


def photos_of(folder, **changes):
    return cc.Photos("cpu", cc.Settings(**{"data": str(folder), "batch_size": 8, "width": 32} | changes))


@pytest.fixture(scope="session")
def photos(photos_folder):
    return photos_of(photos_folder)


def test_photos_are_the_images_and_captions_of_the_folder(photos, photos_folder):
    assert photos.images.shape == (30, 3, 32, 32) and photos.images.dtype == torch.uint8
    assert photos.spans[:, 1].tolist() == [1, 2, 3] * 10 and photos.spans[:4, 0].tolist() == [0, 1, 3, 6]
    held_out = photos.held_out["dev"].tolist()
    assert len(held_out) == 3 and sorted(held_out + photos.train.tolist()) == list(range(30))
    fit = cc.preprocess(cc.Settings(data="x"))
    for i in (0, 7, 29):
        image = fit(Image.open(photos_folder / "Images" / f"{i}.png"))
        torch.testing.assert_close(photos.images[i] / 255, image)
        assert photos.images[i, 2].float().mean() == 8 * i % 256
        first, count = photos.spans[i]
        found = cc.tokenize([f"a {WORDS[i % 5]} dog the {j}th runs" for j in range(count)], photos.vocabulary)
        assert torch.equal(photos.words[first : first + count], found)


def test_words_seen_fewer_than_five_times_in_training_are_unknown(photos):
    counts = {}
    for i in photos.train.tolist():
        for j in range(i % 3 + 1):
            for word in ["a", WORDS[i % 5], "dog", "the", f"{j}th", "runs"]:
                counts[word] = counts.get(word, 0) + 1
    assert set(photos.vocabulary) == {"<pad>", "<unk>"} | {w for w, n in counts.items() if n >= 5}
    assert cc.build_vocabulary(["b b a", "a c a"], least=2) == {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}


def test_pairs_of_image_and_text_give_the_same_as_a_table(photos, tmp_path):
    for i in range(30):
        (tmp_path / f"part{i % 2}").mkdir(exist_ok=True)
        gradient(i).save(tmp_path / f"part{i % 2}" / f"{i}.png")
        lines = [f'A {WORDS[i % 5]} dog, the "{j}th" , runs .' for j in range(i % 3 + 1)]
        (tmp_path / f"part{i % 2}" / f"{i}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    pairs = photos_of(tmp_path)
    assert list(pairs.vocabulary) == list(photos.vocabulary)
    order = pairs.images[:, 2, 0, 0].argsort()
    assert torch.equal(pairs.images[order], photos.images) and torch.equal(pairs.spans[order, 1], photos.spans[:, 1])
    assert sorted(pairs.words.tolist()) == sorted(photos.words.tolist())


def test_split_files_decide_when_they_are_there(tmp_path):
    folder = make_photos(tmp_path / "p")
    for split, numbers in (("train", range(0, 20)), ("dev", range(20, 24)), ("test", range(24, 29))):
        (folder / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{i}.png\n" for i in numbers))
    photos = photos_of(folder)
    assert photos.train.tolist() == list(range(20))
    assert {split: chosen.tolist() for split, chosen in photos.held_out.items()} == {"dev": [20, 21, 22, 23], "test": [24, 25, 26, 27, 28]}


def test_images_of_every_kind_are_read_upright_and_in_colour(tmp_path):
    folder = make_photos(tmp_path / "p", 12)
    gradient(3).convert("CMYK").save(folder / "Images" / "c.jpg")
    gradient(3).convert("L").save(folder / "Images" / "g.png")
    gradient(3).convert("RGBA").save(folder / "Images" / "a.png")
    exif = Image.Exif()
    exif[0x112] = 3  # the camera was upside down
    gradient(3).rotate(180).save(folder / "Images" / "e.png", exif=exif)
    with open(folder / "captions.txt", "a") as file:
        file.writelines(f"{name},a dog\n" for name in ("c.jpg", "g.png", "a.png", "e.png"))
    cmyk, grey, alpha, turned = photos_of(folder).images[12:].float()
    plain = photos_of(folder).images[3].float()
    assert torch.equal(alpha, plain) and torch.equal(turned, plain) and torch.equal(grey[0], grey[2])
    assert (cmyk - plain).abs().mean() < 12


def test_a_batch_holds_an_image_once_with_a_caption_of_its_own(photos):
    settings, generator, drawn = cc.Settings(data="x", batch_size=20), torch.Generator().manual_seed(0), {}
    for _ in range(40):
        images, words = photos.draw_batch(settings, generator)
        assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32
        numbers = (images[:, 2].mean((1, 2)) * 255 / 8).round().int().tolist()
        assert len(set(numbers)) == 20 and set(numbers) <= set(photos.train.tolist())
        for i, caption in zip(numbers, words):
            place = [j for j in range(photos.spans[i, 0], photos.spans[i].sum()) if torch.equal(photos.words[j], caption)]
            assert len(place) == 1
            drawn.setdefault(i, set()).add(place[0])
    assert all(len(places) == photos.spans[i, 1] for i, places in drawn.items()) and len(drawn) == len(photos.train)


def test_crops_keep_half_the_area_within_the_image_and_half_are_mirrored(photos):
    images = torch.cat([photos.draw_batch(cc.Settings(data="x", batch_size=20), torch.Generator().manual_seed(i))[0] for i in range(20)])
    start, end = images[:, 0, 16, 1], images[:, 0, 16, 30]  # of the red, which grows by 60 / 90 over the square
    mirrored = (end < start).float().mean()
    assert 0.4 < mirrored < 0.6 and (images[:, 1, 30, 16] > images[:, 1, 1, 16]).all()  # never upside down
    wide, high = (end - start).abs() * 32 / 29 * 90 / 60, (images[:, 1, 30, 16] - images[:, 1, 1, 16]) * 32 / 29
    area = wide * high
    assert area.min() > 0.42 and area.max() < 1.08 and 0.65 < area.mean() < 0.8 and area.std() > 0.1
    ratio = wide / high
    assert ratio.min() > 0.7 and ratio.max() < 1.45 and ratio.std() > 0.1
    corner = images[:, 1, 1, 16]  # where the crops begin: some at the top, some below
    assert corner.min() < 0.05 and corner.max() > 0.2


class Echo:
    """A model that encodes image i and its captions as given."""

    def __init__(self, photos, x, t):
        self.photos, self.x, self.t = photos, x, t

    def encode_image(self, images, normalize):
        return torch.stack([self.x[round(i)] for i in (images[:, 2].mean((1, 2)) * 255 / 8).tolist()])

    def encode_text(self, words, normalize):
        self.seen = getattr(self, "seen", 0) + len(words)
        return self.t[self.seen - len(words) : self.seen]


def test_recall_is_that_of_a_plain_loop(photos):
    chosen = photos.train
    photos_, g = cc.Photos.__new__(cc.Photos), torch.Generator().manual_seed(0)
    photos_.__dict__ = photos.__dict__ | {"held_out": {"dev": chosen}}
    owners = [i for i in chosen.tolist() for _ in range(photos.spans[i, 1])]
    x, t = normalize(torch.randn(30, 3, generator=g), dim=1), normalize(torch.randn(len(owners), 3, generator=g), dim=1)
    t = normalize(t + 0.6 * x[owners], dim=1)
    expected = {}
    for k in (1, 5, 10):
        hits = [i in sorted(chosen.tolist(), key=lambda n: -(x[n] @ t[c]).item())[:k] for c, i in enumerate(owners)]
        found = [any(owners[c] == i for c in sorted(range(len(owners)), key=lambda c: -(x[i] @ t[c]).item())[:k]) for i in chosen.tolist()]
        expected[k] = 100 * np.mean(hits), 100 * np.mean(found)
    result = photos_.validate(Echo(photos, x, t))["dev"]
    assert result == pytest.approx([expected[k][side] for side in (0, 1) for k in (1, 5, 10)], abs=1e-3)
    assert 5 < result[0] < result[1] < result[2] < 100
    same = torch.ones(30, 3) / 3**0.5  # a collapsed model finds nothing
    assert photos_.validate(Echo(photos, same, same[:1].expand(len(owners), 3)))["dev"] == [0] * 6


def test_chance_is_that_of_guessing(photos, capsys):
    photos_ = cc.Photos.__new__(cc.Photos)
    photos_.__dict__ = photos.__dict__ | {"held_out": {"dev": torch.arange(30)}}
    photos_.report([])
    shown = [float(v) for v in capsys.readouterr().out.splitlines()[-1].split()[3:]]
    rng, owners = np.random.default_rng(0), np.repeat(np.arange(30), photos.spans[:, 1])
    for k, column in ((1, 3), (5, 4), (10, 5)):
        assert shown[column - 3] == pytest.approx(100 * k / 30, abs=0.06)
        hits = [len(set(owners[rng.permutation(60)[:k]])) / 30 for _ in range(4000)]  # of 30 images, those guessed
        assert shown[column] == pytest.approx(100 * np.mean(hits), abs=0.6)


def test_photographs_train_resume_and_classify(photos_folder, pictures, tmp_path, capsys):
    arguments = ["--data", str(photos_folder), "--image-size", "40", *PHOTOS]
    cc.main([*arguments, "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert "27 photographs, 3 steps of 8" in output
    rows = [line for line in output.splitlines() if " 3 dev" in line]
    assert [row.split()[0] for row in rows] == ["clip", "clixp", "chance"]
    assert all(0 <= float(value) <= 100 for row in rows[:2] for value in row.split()[4:10])
    before = torch.load(tmp_path / "clixp.pt", weights_only=True)
    assert len(before["result"]["dev"]) == 6 and before["settings"]["image_size"] == 40
    cc.main([*arguments, "--out", str(tmp_path), "--resume"])  # finished: the same table
    assert [line for line in capsys.readouterr().out.splitlines() if " 3 dev" in line] == rows
    fs.main(["--out", str(tmp_path), "--data", str(pictures), "--shots", "1", "2", "--queries", "3", "--seeds", "2"])
    assert "found on other images of the classes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fs.main(["--out", str(tmp_path)])
    assert "trained on photographs" in capsys.readouterr().err


def test_photographs_go_on_exactly_where_they_stopped(photos, tmp_path, monkeypatch):
    settings = cc.Settings("clixp", data="x", batch_size=8, width=32, steps=20, precision="float32")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    cc.train(settings, photos, whole)
    monkeypatch.setattr(cc, "SAVE_EVERY", 10)

    def stop(step, model):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cc.train(settings, photos, stopped, watch=stop)
    assert torch.load(stopped / "clixp.pt", weights_only=True)["log"][-1][0] == 10
    cc.train(settings, photos, stopped, resume=True)
    one, two = (torch.load(folder / "clixp.pt", weights_only=True)["model"] for folder in (whole, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)
    photos_ = cc.Photos.__new__(cc.Photos)
    photos_.__dict__ = photos.__dict__ | {"vocabulary": {"other": 0}}
    (stopped / "clixp.pt").unlink()
    with pytest.raises(KeyboardInterrupt):
        cc.train(settings, photos, stopped, watch=stop)
    with pytest.raises(cc.UserError, match="captions"):
        cc.train(settings, photos_, stopped, resume=True)


def test_validation_images_of_a_photo_model_are_not_its_test_images(pictures):
    fit = {"seeds": range(4), "shots": 2, "queries": 3, "device": "cpu", "settings": cc.Settings(data="x", image_size=48)}
    drawn = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        task = fs.image_task(str(pictures), ["{}"], None, part=part, **fit)
        images = torch.cat([task.draw(seed, 2, 3) for seed in range(4)])
        assert images.shape == (20, 3, 3, 48, 48)
        drawn.append({image.mean().item() for image in images.flatten(0, 1)})
    assert len(drawn[0]) == len(drawn[1]) == 15 and not drawn[0] & drawn[1]


def break_photos(folder, how):
    table, image = folder / "captions.txt", folder / "Images" / "4.png"
    text = table.read_text()
    {
        "missing image": lambda: image.unlink(),
        "broken image": lambda: image.write_bytes(image.read_bytes()[:60]),
        "no table": lambda: table.rename(folder / "other.csv"),
        "header": lambda: table.write_text(text.replace("image,caption", "file,text")),
        "no header": lambda: table.write_text(text.split("\n", 1)[1]),
        "nothing": lambda: table.write_text(""),
        "no rows": lambda: table.write_text("image,caption\n"),
        "no caption": lambda: table.write_text(text + "4.png, . \n"),
        "columns": lambda: table.write_text(text + "4.png,a dog, a cat\n"),
        "quote": lambda: table.write_text(text + '4.png,"a dog\n5.png,a cat\n'),
        "encoding": lambda: table.write_bytes(text.encode() + "4.png,caf\u00e9\n".encode("latin-1")),
    }[how]()
    return folder


BROKEN = {
    "missing image": r"captions.txt, row 9: there is no .*4.png \(1 more\); --skip-bad goes on without them",
    "broken image": r"captions.txt, row 9: .*4.png cannot be read \(.+\); --skip-bad",
    "no table": r"--data .*: neither captions.txt nor pairs",
    "header": r"captions.txt: its first line must be image,caption",
    "no header": r"captions.txt: its first line must be image,caption",
    "nothing": r"captions.txt: its first line must be image,caption",
    "no rows": r"--data .*: 0 train images, fewer than 8",
    "no caption": r"captions.txt, row 62: the caption is empty",
    "columns": r"captions.txt, row 62: 3 columns instead of 2",
    "quote": r"captions.txt, row 62: a quote is not closed",
    "encoding": r"captions.txt is not UTF-8, from byte \d+ on",
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_photographs_are_told_in_one_line_before_training(how, tmp_path, capsys):
    folder, out = break_photos(make_photos(tmp_path / "p"), how), tmp_path / "out"
    with pytest.raises(SystemExit) as exit:
        cc.main(["--data", str(folder), *PHOTOS, "--out", str(out)])
    error = capsys.readouterr().err.split("\r")[-1].strip()
    assert exit.value.code == 2 and not list(out.glob("*.pt"))
    assert re.fullmatch(f"contextclip: .*{BROKEN[how]}.*", error)


@pytest.mark.parametrize("how, left", [("missing image", 29), ("broken image", 29), ("no caption", 30), ("columns", 30), ("quote", 30)])
def test_skip_bad_goes_on_without_what_is_bad(how, left, tmp_path, capsys):
    folder = break_photos(make_photos(tmp_path / "p"), how)
    settings = cc.Settings(data=str(folder), batch_size=8, width=32)
    photos = cc.Photos("cpu", settings, skip_bad=True)
    assert len(photos.images) == len(photos.spans) == left and photos.spans[:, 1].sum() == len(photos.words)
    blue = photos.images[:, 2, 0, 0]
    assert torch.equal(blue, 8 * torch.tensor([i for i in range(30) if i != 4 or left == 30], dtype=torch.uint8))
    assert re.search(rf"left out: .*captions.txt, row \d+.*; {2 if how == 'missing image' else 1} such in all", capsys.readouterr().out)


def test_pairs_that_lack_a_half_are_bad(tmp_path, capsys):
    gradient(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    gradient(1).save(tmp_path / "b.png")
    (tmp_path / "c.txt").write_text("a cat")
    found, bad = cc.read_captions(tmp_path)
    assert [(path.name, caption) for path, caption, _ in found] == [("a.png", "a dog")]
    assert len(bad) == 2 and "b.png: there is no b.txt" in bad[0] and "c.txt: there is no image c" in bad[1]
    with pytest.raises(cc.UserError, match="no such folder"):
        cc.read_captions(tmp_path / "none")


def test_fewer_images_than_the_batch(photos_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cc.main(["--data", str(photos_folder), *PHOTOS, "--batch-size", "28", "--out", str(tmp_path)])
    assert exit.value.code == 2 and "27 train images, fewer than 28" in capsys.readouterr().err


# ---- encoders of torchvision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet"])
def test_encoders_of_torchvision_embed_grey_and_colour_of_any_size(name):
    model = cc.ContextCLIP(cc.Settings(encoder=name, width=32, image_size=64), ["a", "b"])
    torch.manual_seed(0)
    model.train()(torch.rand(4, 1, 64, 64), torch.ones(4, 2, dtype=torch.long))[0].sum().backward()
    model.eval()
    colour = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        v = model.encode_image(colour)
        assert v.shape == (4, 32) and torch.allclose(model.encode_image(colour[:1]), v[:1], atol=1e-4)
        assert not torch.equal(model.encode_image(colour[:, :1]), v)
        assert model.encode_image(torch.rand(4, 1, 32, 32)).shape == (4, 32)
    trained = [p for p in model.image_encoder.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) > 0.9 * len(list(model.image_encoder.parameters()))


def test_vit_of_torchvision_takes_the_image_size():
    model = cc.ContextCLIP(cc.Settings(encoder="vit_b_16", width=32, image_size=32), ["a"])
    assert model.encode_image(torch.rand(2, 1, 32, 32)).shape == (2, 32)


def test_pretrained_weights_are_used_once_and_saved(monkeypatch, tmp_path, atlas):
    source, asked = torchvision.models.resnet18().state_dict(), []
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: asked.append(a) or source)
    settings = cc.Settings(encoder="resnet18", pretrained=True, width=32, image_size=32, batch_size=8, steps=1, precision="float32")
    model = cc.ContextCLIP(settings, ["a"])
    assert torch.equal(model.image_encoder.conv1.weight, source["conv1.weight"]) and model.image_encoder.fc.out_features == 32
    cc.train(settings, atlas, tmp_path)
    del asked[:]
    loaded = cc.load(tmp_path / "clip.pt")
    assert not asked and loaded.encode_image(torch.rand(2, 1, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("arguments, message", [
    (["--encoder", "resnet19"], "--encoder resnet19: neither cnn, nor vit, nor a classification model"),
    (["--encoder", "fcn_resnet50"], "--encoder fcn_resnet50: neither"),
    (["--encoder", "alexnet"], "--encoder alexnet with --image-size 32"),
    (["--pretrained"], "--pretrained: there are no weights for --encoder cnn"),
    (["--image-size", "36"], "--image-size 36: it must be a multiple of 8"),
    (["--image-size", "232"], "--image-size 232: it must lie between 32 and 224"),
])  # fmt: skip
def test_encoders_that_do_not_fit_are_told_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cc.main([*SMALL, *arguments, "--out", str(tmp_path)])
    assert exit.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.glob("*.pt"))


def test_weights_that_cannot_be_had_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(SystemExit) as exit:
        cc.main([*SMALL, "--encoder", "resnet18", "--pretrained", "--out", str(tmp_path)])
    assert exit.value.code == 2 and "--encoder resnet18 with --image-size 32: no network" in capsys.readouterr().err


# ---- studies --------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch):
    """figures/study.py, with small models, few tasks, and nothing written into figures/."""
    spec = importlib.util.spec_from_file_location("study", Path(SCRIPT).parent / "figures" / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "FIGURES", tmp_path)
    for name, value in {"steps": 40, "batch_size": 64, "width": 32, "characters": 250}.items():
        index = [f.name for f in dataclasses.fields(cc.Settings)].index(name)
        defaults = list(cc.Settings.__init__.__defaults__)
        defaults[index] = value
        monkeypatch.setattr(cc.Settings.__init__, "__defaults__", tuple(defaults))
        monkeypatch.setattr(cc.Settings, name, value)
    monkeypatch.setattr(study, "STUDIES", {"width": study.sweep("width", [32, 64]), "post": {
        "2 steps": {"base": {"objective": "clip", "steps": 2}, "context": {"steps": 2}}}, "tuning": study.sweep("lr", [0.001]),
        "ablations": {"": {name: study.ABLATIONS[name] for name in ("base", "full", "no self-mask")}}})  # fmt: skip
    monkeypatch.setattr(study, "ABLATIONS", study.STUDIES["ablations"][""])
    monkeypatch.setattr(study.fs, "TASKS", {name: fs.TASKS[name] for name in ("digits", "Lao")})
    monkeypatch.setattr(study.fs.card_tasks, "__defaults__", (study.fs.TASKS,))
    return study


def run_study(study, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    study.main()


def test_studies_train_once_and_draw_from_their_csv(study, monkeypatch, tmp_path, capsys):
    run_study(study, monkeypatch, "width", "--seeds", "1")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and table[2].startswith("| 32 |") and table[3].startswith("| 64 |")
    rows = list(csv.DictReader(open(tmp_path / "width.csv")))
    assert len(rows) == 2 * 2 * 2 * (1 + 3)  # widths, models, tasks; zero-shot and three numbers of shots
    models = sorted(tmp_path.glob("runs/study/*/seed0/*.pt"))
    assert [str(path.relative_to(tmp_path / "runs/study")) for path in models] == [
        "default/seed0/clip.pt", "default/seed0/clixp.pt", "width=64/seed0/clip.pt", "width=64/seed0/clixp.pt"]  # fmt: skip
    times = [path.stat().st_mtime_ns for path in models]
    for arguments in (["width", "--seeds", "1"], ["width", "--draw"]):
        (tmp_path / "width.png").unlink()
        run_study(study, monkeypatch, *arguments)
        assert table == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert times == [path.stat().st_mtime_ns for path in models] and (tmp_path / "width.png").exists()


def test_the_gain_in_a_studys_table_is_context_less_base(study, capsys, tmp_path):
    values = {("base", "4"): 50.0, ("context", "4"): 53.5, ("base", "0"): 40.0, ("context", "0"): 39.0}
    rows = [("a", m, str(seed), task, "seen", k, str(values.get((m, k), 10.0))) for m in ("base", "context")
            for seed in (0, 1) for task in ("t", "u") for k in ("0", "1", "4", "16")]  # fmt: skip
    rows += [("a", m, str(seed), "w", "unseen", "0", "0") for m in ("base", "context") for seed in (0, 1)]
    study.draw_sweep(rows, tmp_path / "x.png")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| a | 40.0 | 10.0 | 50.0 | 10.0 | -1.0 ± 0.0 | +0.0 ± 0.0 | +3.5 ± 0.0 | +0.0 ± 0.0 |"


def test_ablations_post_training_and_tuning(study, monkeypatch, capsys, tmp_path):
    run_study(study, monkeypatch, "ablations", "--seeds", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| full", "| no self-mask"]
    assert lines[4].split(" | ")[1:3] == ["50.9", "60.5"]  # the paper's
    assert cc.read_checkpoint(tmp_path / "runs/study/no_mask=True/seed0/clixp.pt")["settings"]["no_mask"]
    run_study(study, monkeypatch, "post", "--seeds", "1")
    start, end = (cc.read_checkpoint(tmp_path / f"runs/study/{p}/seed0/clip.pt")["model"]["log_tau_1"] for p in ("default", "post/steps=2"))
    assert abs(start - math.log(cc.Settings.tau)) > 1e-4 and 0 < abs(end - start) < 0.01
    run_study(study, monkeypatch, "tuning", "--seeds", "1")
    result = cc.read_checkpoint(tmp_path / "runs/study/lr=0.001/seed0/clip.pt")["result"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.001")]
    assert table[0].split(" | ")[1:5] == [f"{result[k]:.1f}" for k in ("zero-shot", 1, 4, 16)]


def test_emergence_follows_both_models(study, monkeypatch, tmp_path):
    run_study(study, monkeypatch, "emergence", "--seeds", "1")
    rows = list(csv.DictReader(open(tmp_path / "emergence.csv")))
    assert [(row["model"], row["step"]) for row in rows] == [("clip", "40"), ("clixp", "40")]
    log = list(csv.DictReader(open(tmp_path / "runs/study/emergence/seed0/clixp.csv")))[-1]
    assert float(rows[1]["context_loss"]) == pytest.approx(float(log["context_loss"]), abs=1e-4) and 0 < float(rows[1]["attention_same"]) < 1
    result = cc.read_checkpoint(tmp_path / "runs/study/emergence/seed0/clixp.pt")["result"]
    assert float(rows[1]["16-shot"]) == pytest.approx(result[16], abs=1e-4)


def test_pictures_and_profile(study, monkeypatch, tmp_path, capsys):
    for name in ("attention", "cards"):
        run_study(study, monkeypatch, name)
        assert Image.open(tmp_path / f"{name}.png").size[0] > 800
    assert re.search(r"context: [\d.]+ % of the attention on the same character", capsys.readouterr().out)
    run_study(study, monkeypatch, "profile")
    assert re.search(r"full step +[\d.]+ ms +100%\nencoders +[\d.]+ ms +\d+%\ncards.*\nloss", capsys.readouterr().out)


def test_speed_study_compares_the_two_ways(study, monkeypatch, capsys, photos_folder):
    monkeypatch.setattr(study, "time_against_plain", lambda folder, time=study.time_against_plain: time(folder, steps=2, rounds=2))
    monkeypatch.setattr(cc.Settings.__init__, "__defaults__", tuple(16 if d == 64 else d for d in cc.Settings.__init__.__defaults__))
    for arguments in ([], ["--data", str(photos_folder)]):
        run_study(study, monkeypatch, "speed", *arguments)
        plain, ours, ratios = re.search(r"plain ([\d,]+), ours ([\d,]+); ratio, round by round: (.+)", capsys.readouterr().out).groups()
        ratios = [float(ratio) for ratio in ratios.split(", ")]
        assert len(ratios) == 2 and min(ratios) <= float(ours.replace(",", "")) / float(plain.replace(",", "")) * 1.1


def test_memory_study_measures_each_size(study, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "study", study)  # the measuring processes import it
    monkeypatch.syspath_prepend(str(Path(SCRIPT).parent / "figures"))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    study.tabulate_memory(sizes=(1024,), chunk=64)
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert cells[0] == "| 1,024" and float(cells[1]) > 2 * float(cells[3]) > 0 and float(cells[2]) > 0


def test_cards_of_no_distortion_are_upright_and_clean(atlas):
    plain = cc.Atlas("cpu", cc.Settings(characters=300, distortion=0.0))
    characters = atlas.train[:64]

    def edges(atlas):  # of the ground, where nothing is drawn
        images, _ = cc.draw_cards(atlas, characters, "train", torch.Generator().manual_seed(0))
        return images[:, 0, 0].std(dim=1).max().item()

    assert edges(plain) == pytest.approx(0, abs=1e-6) and edges(atlas) > 0.01
