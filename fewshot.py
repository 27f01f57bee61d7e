"""Few-shot classification with the models of contextclip.py: 21 tasks, ten classifiers, accuracy against shots.

    python fewshot.py                               evaluate and compare the models in runs/
    python fewshot.py --data DIR --template "a photo of a {}"       on images of your own, a folder per class
    python fewshot.py --data MNIST --template "digit {}"            on a dataset that torchvision knows
    python fewshot.py --help                        every setting

An episode is a few labelled images per class, the support, and queries to classify. The classifiers work on normalised
embeddings; six of them are training-free, as in the paper. The file's order: 1 classifiers, 2 tasks, 3 evaluation with
hyper-parameters, 4 what is printed and drawn, 5 images of your own, 6 command line.
"""

import argparse
import csv
import inspect
import itertools
import json
import re
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot as plt
from tqdm import tqdm

import contextclip as cc
from contextclip import UserError

# ---- 1. Classifiers -------------------------------------------------------------------------------------------------
# One signature: query x (..., Q, d), support X_s (..., S, d) with labels (S,), text T (C, d), all normalised; scale
# (..., 1, 1) from `text_scale`; then the classifier's hyper-parameters. Returns scores (..., Q, C), the highest wins, of
# equal ones the first class. The leading dimensions are episodes, all computed at once. Y_s: the labels, one-hot.

def zero_shot(query, support, labels, text, scale):
    """x T^t (Radford et al. 2021)."""
    return query @ text.mT

def prototypes(query, support, labels, text, scale):
    """x P^t, P the class means of X_s, normalised again (Snell et al. 2017)."""
    return query @ cc.prototypes(support, labels, len(text)).mT

def prototypes_text(query, support, labels, text, scale, c):
    """(1 - w) x T^t + w x P^t with w = c / (c + scale): text counts as far as it explains the support."""
    w = c / (c + scale)
    return (1 - w) * (query @ text.mT) + w * prototypes(query, support, labels, text, scale)

def cache(query, keys, labels, classes, b):
    """exp(-b (1 - x K^t)) Y_s: what a class's support images say, the nearer the louder."""
    return (b * (query @ keys.mT - 1)).exp() @ F.one_hot(labels, classes).to(query)

def tip_adapter(query, support, labels, text, scale, a, b):
    """scale x T^t + a exp(-b (1 - x X_s^t)) Y_s (Zhang et al. 2022, with scale for their 100)."""
    return scale * (query @ text.mT) + a * cache(query, support, labels, len(text), b)

def tip_x(query, support, labels, text, scale, a, b, g, temp):
    """Tip-Adapter + g R(-KL(p_query || p_support)) Y_s with signatures p = softmax(x T^t / temp); R stretches a query's
    row into the range of its cosines x X_s^t (Udandarao et al. 2023; they take the range over all queries)."""
    log_p, log_s = (F.log_softmax(x @ text.mT / temp, dim=-1) for x in (query, support))
    affinity = log_p.exp() @ log_s.mT  # -KL up to a constant of the row, which R removes
    cosine = query @ support.mT
    (low, high), (start, end) = affinity.aminmax(dim=-1, keepdim=True), cosine.aminmax(dim=-1, keepdim=True)
    affinity = start + (affinity - low) / (high - low).clamp_min(1e-6) * (end - start)
    return tip_adapter(query, support, labels, text, scale, a, b) + g * (affinity @ F.one_hot(labels, len(text)).to(query))

def vote(query, support, labels, text, scale, k, weight):
    """The k nearest support images vote for their classes, each with weight(cosines (..., Q, k), ranks (k,) from 0)."""
    cosine, nearest = (query @ support.mT).topk(min(k, len(labels)))
    weights = weight(cosine, torch.arange(cosine.shape[-1], device=cosine.device)).expand_as(cosine)
    return torch.zeros(*cosine.shape[:-1], len(text)).to(cosine).scatter_add_(-1, labels[nearest], weights)

def one_each(cosine, rank):
    """1, and as tie-break a small part, below 1/2 in all, by rank: of equally many votes the nearer ones win."""
    k = len(rank)
    return 1 + (k - rank).to(cosine) / (k * (k + 1))

plurality_vote = partial(vote, weight=one_each)
softmax_vote = partial(vote, weight=lambda cosine, rank: (cosine / 0.07).exp())  # the temperature: Wu et al. 2018
rank_vote = partial(vote, weight=lambda cosine, rank: 1 / (2 + rank.to(cosine)))

@torch.enable_grad()
def linear_probe(query, support, labels, text, scale, l2):
    """x W^t + c, where W and c minimise the mean cross-entropy of the support + l2 |W|^2 / 2: logistic regression."""
    W = support.new_zeros(*support.shape[:-2], len(text), support.shape[-1], requires_grad=True)
    c = support.new_zeros(*support.shape[:-2], 1, len(text), requires_grad=True)
    optimizer = torch.optim.LBFGS([W, c], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = support @ W.mT + c  # (..., S, C)
        entropy = F.cross_entropy(logits.flatten(0, -2), labels.repeat(logits[..., 0, 0].numel()), reduction="sum")
        value = entropy / len(labels) + l2 / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (query @ W.mT + c).detach()

@torch.enable_grad()
def tip_adapter_f(query, support, labels, text, scale, a, b, lr, steps=20):
    """Tip-Adapter whose keys, at first X_s, are fine-tuned: AdamW lowers the cross-entropy of support images, at most 128
    a step, each classified by the others' keys and the text (Zhang et al. 2022, without their augmentation)."""
    keys, generator = support.clone().requires_grad_(), torch.Generator(support.device).manual_seed(0)
    optimizer = torch.optim.AdamW([keys], lr=lr, eps=1e-4)
    for _ in range(steps):
        rows = torch.randperm(len(labels), device=labels.device, generator=generator)[:128]
        x, target = support[..., rows, :], labels[rows]
        own = a * ((x * keys[..., rows, :]).sum(-1, keepdim=True) - 1).mul(b).exp() * F.one_hot(target, len(text))
        logits = tip_adapter(x, keys, labels, text, scale, a, b) - own
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.flatten(0, -2), target.repeat(logits[..., 0, 0].numel()), reduction="sum")
        (loss / len(target)).backward()
        optimizer.step()
    return tip_adapter(query, keys, labels, text, scale, a, b).detach()

CLASSIFIERS = {"zero-shot": zero_shot, "prototypes": prototypes, "prototypes + text": prototypes_text,
               "Tip-Adapter": tip_adapter, "Tip-X": tip_x, "plurality vote": plurality_vote, "softmax vote": softmax_vote,
               "rank vote": rank_vote, "linear probe": linear_probe, "Tip-Adapter-F": tip_adapter_f}  # fmt: skip
SIX = ["prototypes", "Tip-Adapter", "Tip-X", "plurality vote", "softmax vote", "rank vote"]  # the paper's training-free
OPTIMISED = ["linear probe", "Tip-Adapter-F"]

def text_scale(support, labels, text, temperature):
    """How far to trust the captions: the scale s, a share of the model's tau, at which softmax(s x T^t) gives the support
    images their labels with the highest likelihood; 0 where captions say nothing. The one choice made per episode, and it
    sees the support alone. support (..., S, d), text (C, d) -> (..., 1, 1)."""
    scales = temperature * torch.tensor([0, *2.0 ** torch.arange(-6, 1)]).to(support)
    logits = (support @ text.mT)[..., None, :, :] * scales[:, None, None]  # (..., scales, S, C)
    likelihood = logits.log_softmax(-1)[..., torch.arange(len(labels), device=labels.device), labels].mean(-1)
    return scales[likelihood.argmax(-1)][..., None, None]

# ---- 2. Tasks -------------------------------------------------------------------------------------------------------

GROUPS = {"seen": "characters trained, typefaces never seen", "combined": "letter and diacritic never seen together",
          "unseen": "scripts and symbols never seen"}  # fmt: skip
MOST = 40  # classes of a built-in task; of more characters, these many by chance
TASKS = {  # name: group, pattern that "character name" starts with
    "digits": ("seen", "[0-9]"), "Latin capitals": ("seen", "[A-Z]"), "Latin small letters": ("seen", "[a-z]"),
    "Greek": ("seen", ". greek"), "arrows": ("seen", "[\u2190-\u21ff]"), "operators": ("seen", "[\u2200-\u22ff]"),
    "capitals + diacritic": ("combined", ". latin capital letter [a-z] with "),
    "small + diacritic": ("combined", ". latin small letter [a-z] with "),
    "Cyrillic": ("unseen", "[\u0410-\u044f]"), "Armenian": ("unseen", ". armenian"), "Georgian": ("unseen", ". georgian"),
    "Hebrew": ("unseen", "[\u05d0-\u05ea]"), "Arabic": ("unseen", "[\u0600-\u06ff] arabic letter"),
    "Lao": ("unseen", ". lao"), "Lisu": ("unseen", ". lisu"), "Canadian syllabics": ("unseen", ". canadian"),
    "Braille": ("unseen", ". braille"), "box drawing": ("unseen", ". box drawings"), "playing cards": ("unseen", ". playing card"),
    "dominoes": ("unseen", ". domino tile"), "hexagrams": ("unseen", ". hexagram"),
}  # fmt: skip

@dataclass
class Task:
    """captions: for each of C classes the captions whose mean embedding stands for it. draw(seed, shots, queries) ->
    (queries + shots, C, 1 or 3, S, S): the queries come first and depend on neither `shots` nor the model, and fewer shots
    are the first of more."""

    name: str
    group: str
    captions: list[list[str]]
    draw: Callable

def card_task(atlas, name, group, members, faces):
    """A task of glyph cards of some characters (their numbers in the atlas) in typefaces of one group of cc.FACES."""
    members = torch.as_tensor(members, device=atlas.train.device)

    def cards(count, *stream):  # each stream of random numbers is its own: of task, seed and role
        generator = torch.Generator(members.device).manual_seed(zlib.crc32(repr((name, *stream)).encode()))
        return cc.draw_cards(atlas, members.repeat(count), faces, generator)[0].unflatten(0, (count, len(members)))

    def draw(seed, shots, queries):
        blocks = [cards(32, seed, "support", block) for block in range(-(-shots // 32))]
        return torch.cat([cards(queries, seed, "query"), *blocks])[: queries + shots]

    return Task(name, group, [atlas.prompts(i) for i in members.tolist()], draw)

def card_tasks(atlas, names=TASKS):
    """The built-in tasks of these names. Seen and combined characters are drawn in STIX, typefaces never trained; the
    other scripts exist in DejaVu alone: there the characters are new, the typefaces are not."""
    trained, tasks = set(atlas.train.tolist()), []
    splits = {i: cc.split_of(c) for c, i in atlas.index.items()}
    for name in names:
        group, start = TASKS[name]
        faces = "train" if group == "unseen" else "test"
        members = [i for c, i in atlas.index.items() if re.match(start, f"{c} {atlas.names[i]}") and atlas.rows[faces][i, 1]
                   and (i in trained if group == "seen" else splits[i] == "test")]  # fmt: skip
        if group == "combined":  # of letters and diacritics that are trained
            members = [i for i in members if atlas.knows(i)]
        members = sorted(sorted(members, key=lambda i: zlib.crc32(atlas.names[i].encode()))[:MOST])
        if len(members) > 1:  # a model of few characters has not seen all groups
            tasks.append(card_task(atlas, name, group, members, faces))
    return tasks

def validation_tasks(atlas):
    """The tasks on which hyper-parameters are chosen: characters and typefaces that serve nothing else."""
    return [card_task(atlas, name, "combined" if name == "combinations" else "unseen", members, "validation")
            for name, members in atlas.validation.items()]  # fmt: skip

# ---- 3. Evaluation --------------------------------------------------------------------------------------------------

def grid(**values):
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]

GRIDS = {  # of hyper-parameters; the validation tasks decide, for each number of shots
    "prototypes + text": grid(c=[8, 16, 32, 64, 128, 256]),
    "Tip-Adapter": grid(a=[10, 30, 100], b=[2, 4, 8, 16]),
    "Tip-X": grid(g=[3, 10, 30, 100], temp=[0.1]),
    "plurality vote": grid(k=[1, 2, 4, 8, 16, 32]),
    "softmax vote": grid(k=[1, 4, 8, 16, 32, 64]),
    "rank vote": grid(k=[1, 4, 8, 16, 32, 64]),
    "linear probe": grid(l2=[1e-5, 1e-4, 1e-3]),
    "Tip-Adapter-F": grid(lr=[1e-3, 3e-3, 1e-2]),
}
KEEPS = {"Tip-X": "Tip-Adapter", "Tip-Adapter-F": "Tip-Adapter"}  # the a and b of

@torch.no_grad()
def embed(models, task, seeds, shots, queries):
    """{model's name: (query (seeds, queries C, d), support (seeds, shots C, d), text (C, d), tau_1)}: an embedding of every
    image, once, the same images for every model. Rows come shot by shot: the first k C rows are the k-shot support."""
    parts, out = {name: [] for name in models}, {}
    for seed in seeds:
        images = task.draw(seed, shots, queries)
        for name, model in models.items():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=cc.use_bf16(model.settings, images.device)):
                parts[name] += [model.encode_image(part, normalize=True) for part in images.flatten(0, 1).split(1024)]
    for name, model in models.items():
        query, support = torch.cat(parts[name]).unflatten(0, (len(seeds), -1)).split(
            [queries * len(task.captions), shots * len(task.captions)], dim=1)  # fmt: skip
        tokens = cc.tokenize(itertools.chain(*task.captions), model.vocabulary).to(query.device)
        text = model.encode_text(tokens, normalize=True).unflatten(0, (len(task.captions), -1)).mean(1)
        out[name] = query, support, F.normalize(text, dim=-1), model.log_tau_1.exp().item()
    return out

def episodes(embedded, shots):
    """What the classifiers take, (query, support, labels, text, scale), of an embedded task at a number of shots, all seeds
    at once; with no shots, for zero-shot, no support and no scale."""
    query, support, text, temperature = embedded
    labels, support = torch.arange(len(text), device=text.device).repeat(shots), support[:, : shots * len(text)]
    return query, support, labels, text, text_scale(support, labels, text, temperature) if shots else None

def accuracies(method, episodes, hyper):
    """Percent of the queries classified rightly, for each seed."""
    predicted, classes = CLASSIFIERS[method](*episodes, **hyper).argmax(-1), len(episodes[3])
    labels = torch.arange(classes, device=predicted.device).repeat(predicted.shape[1] // classes)
    return 100 * (predicted == labels).float().mean(-1)

def find_hyperparameters(embedded, weights, methods, shots):
    """{method: {shots: hyper-parameters}}: those of GRIDS with the highest accuracy, weighted, on the embedded validation
    tasks, of equal ones the first. One choice for all models: chosen for each alone, its noise would pass for a gain."""

    weighted = {k: [(w, episodes(e, k)) for w, task in zip(weights, embedded) for e in task.values()] for k in shots}

    def mean(method, k, point):
        return sum(w * accuracies(method, e, point).mean().item() for w, e in weighted[k])

    chosen = {}
    for method in sorted(methods | {KEEPS[m] for m in methods & KEEPS.keys()}, key=list(CLASSIFIERS).index):
        chosen[method] = {}
        for k in shots:
            kept = chosen[KEEPS[method]][k] if method in KEEPS else {}
            points = [kept | point for point in GRIDS.get(method, [{}])]
            chosen[method][k] = max(points, key=partial(mean, method, k)) if len(points) > 1 else points[0]
    return chosen

def evaluate(models, tasks, validation, methods, shots, seeds, queries):
    """Rows (model, task, group, method, shots, seed, accuracy in percent) of one training run's models, zero-shot with 0
    shots, and the hyper-parameters that the validation tasks gave; those with known captions and those with unknown ones
    count the same."""
    few_shot, rows, groups = set(methods) - {"zero-shot"}, [], [task.group for task in validation]
    embedded = [embed(models, task, range(3), max(shots), queries) for task in tqdm(validation, "validation", leave=False)]
    hyper = find_hyperparameters(embedded, [1 / groups.count(group) for group in groups], few_shot, shots)
    for task in tqdm(tasks, "tasks"):
        for name, e in embed(models, task, seeds, max(shots), queries).items():
            drawn = {k: episodes(e, k) for k in [0, *shots]}
            for method in methods:
                for k in shots if method in few_shot else [0]:
                    values = accuracies(method, drawn[k], hyper.get(method, {}).get(k, {})).tolist()
                    rows += [(name, task.name, task.group, method, k, seed, value) for seed, value in zip(seeds, values)]
    return rows, hyper

# ---- 4. Tables and figures ------------------------------------------------------------------------------------------

BASES = {"clixp": "clip", "siglixp": "siglip"}
MEAN = "mean of the six"  # training-free classifiers of the paper
STUDENT = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]  # two-sided 95 %, by degrees of freedom

def interval(values):
    """values (tasks, seeds) -> the mean and the half-width of its 95 % interval, tasks and seeds both drawn by chance:
    two-way clustered variance (Cameron, Gelbach, Miller 2011), Student's t with the smaller number less 1 (10 at most)."""
    rest = values - values.mean()

    def variance(sums):  # of the mean, from independent sums of deviations
        return (sums**2).sum() / values.size**2 * len(sums) / (len(sums) - 1) if len(sums) > 1 else 0.0

    tasks, seeds = variance(rest.sum(1)), variance(rest.sum(0))
    freedom = min((n - 1 for n in values.shape if n > 1), default=0)
    return values.mean(), STUDENT[min(freedom, 10)] * max(tasks + seeds - variance(rest.ravel()), tasks, seeds) ** 0.5

def tabulate(rows, per_run):
    """{(model, method, shots): accuracies (tasks, seeds)} and {task: group} of the rows. Of several training runs, the
    `per_run` seeds of each share a model: their mean counts as one."""
    cells, groups = {}, {row[1]: row[2] for row in rows}
    for model, task, _, method, shots, _, value in rows:
        cells.setdefault((model, method, shots), {}).setdefault(task, []).append(value)
    table = {key: np.array(list(tasks.values())) for key, tasks in cells.items()}
    if any(values.shape[1] > per_run for values in table.values()):
        table = {key: values.reshape(len(values), -1, per_run).mean(-1) for key, values in table.items()}
    for model, method, shots in list(table):
        if method == SIX[0] and all((model, m, shots) in table for m in SIX):
            table[model, MEAN, shots] = np.mean([table[model, m, shots] for m in SIX], axis=0)
    return table, groups

def efficiency(base, context, shots):
    """Sample efficiency at each number of shots k: how many shots the base needs for the context model's accuracy with k,
    read off its curve over log2 shots, divided by k; inf where its most shots do not reach it, and never fewer shots than its
    fewest. base, context: accuracies (len(shots),)."""
    return 2 ** np.interp(context, np.maximum.accumulate(base), np.log2(shots), right=np.inf) / np.array(shots)

def pair(models):
    """[(base, context), ...] of the models that are there in both forms."""
    return [(BASES[model], model) for model in models if BASES.get(model) in models]

def gains(table, groups, context):
    """(shots, [(mean gain of the six, half-width of its 95 % interval over seeds, task), ...]) at 16 shots or the next
    fewer, the highest gain first."""
    shots = max((k for model, method, k in table if method == MEAN and k <= 16), default=0)
    if not shots:
        return 0, []
    values = table[context, MEAN, shots] - table[BASES[context], MEAN, shots]
    return shots, sorted(((*interval(v[None]), task) for v, task in zip(values, groups)), reverse=True)

def report(table, groups):
    """Print the tables. Means are over tasks, each of which counts the same, and seeds; intervals as in `interval`."""
    models, methods = (list(dict.fromkeys(key[i] for key in table)) for i in (0, 1))
    shots, methods = sorted({key[2] for key in table} - {0}), [m for m in methods if m != "zero-shot"]

    def print_row(name, cells):
        print(f"{name:20}" + "".join(f" {cell:>{11 if len(cells) > 3 else 13}}" for cell in cells))

    def difference(base, context):
        return "{:+.1f} ± {:.1f}".format(*interval(context - base))

    pairs = pair(models)
    if (models[0], "zero-shot", 0) in table:
        print()
        print_row("zero-shot, % right", [*models, *(f"{c} - {b}" for b, c in pairs)])
        for group in dict.fromkeys([*groups.values(), "all"]):
            chosen = [group in (g, "all") for g in groups.values()]
            value = {model: table[model, "zero-shot", 0][chosen] for model in models}
            print_row(group, [f"{value[m].mean():.1f}" for m in models] + [difference(value[b], value[c]) for b, c in pairs])

    def print_table(title, cell):
        print()
        print_row(title, [f"{k}-shot" for k in shots])
        for method in methods:
            print_row(method, [cell(method, k) for k in shots])

    for model in models if methods else []:
        print_table(f"{model}, % right", lambda method, k: f"{table[model, method, k].mean():.1f}")
    for base, context in pairs if methods else []:
        print_table(f"{context} - {base}", lambda method, k: difference(table[base, method, k], table[context, method, k]))
        several = [k for k in shots if k >= 4]
        if MEAN in methods and len(several) > 1:
            of_both = (sum(table[model, MEAN, k] for k in several) / len(several) for model in (base, context))
            print(f"{MEAN}, {several[0]} to {several[-1]} shots together: {difference(*of_both)}")
        mean = {key: values.mean() for key, values in table.items()}
        times = {m: efficiency(*([mean[model, m, k] for k in shots] for model in (base, context)), shots) for m in methods}
        print_table("sample efficiency", lambda method, k: f"{times[method][shots.index(k)]:.2f}".replace("inf", f"> {shots[-1] / k:g}"))
        for title, model, kind in (("training-free", context, SIX), ("optimised", base, OPTIMISED)):
            if present := [m for m in kind if m in methods]:
                best = [max((mean[model, m, k], m) for m in present) for k in shots]
                print(f"\nbest {title} on {model}: " + ", ".join(f"{k}-shot {m} {v:.1f}" for k, (v, m) in zip(shots, best)))
        k, bars = gains(table, groups, context)
        print(f"\n{context} - {base} by task, {k} shots, {MEAN}" if bars else "")
        for gain, width, task in bars:
            print(f"{task:22}{groups[task]:10}{gain:+6.1f} ± {width:.1f}")

def draw_curves(table, groups, path):
    """Accuracy against shots, the mean of the six training-free classifiers, with bands over seeds: a panel per group."""
    panels = dict.fromkeys(["all", *groups.values()] if len(set(groups.values())) > 1 else groups.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels) + 0.5, 3.6), layout="constrained", squeeze=False)
    shots, models = (sorted({key[i] for key in table if key[1] == MEAN}) for i in (2, 0))
    for axis, group in zip(axes[0], panels):
        chosen = [group in (g, "all") for g in groups.values()]
        for model in models:
            color, line, marker = ("#D55E00", "-", "s") if model in BASES else ("#0072B2", "--", "o")
            curve = [interval(table[model, MEAN, k][chosen].mean(0, keepdims=True)) for k in shots]
            mean, width = np.nan_to_num(np.array(curve).T)
            axis.plot(shots, mean, line, marker=marker, markersize=4, color=color, label=model)
            axis.fill_between(shots, mean - width, mean + width, color=color, alpha=0.25, linewidth=0)
            if (model, "zero-shot", 0) in table:
                level = table[model, "zero-shot", 0][chosen].mean()
                axis.axhline(level, color=color, linewidth=1, linestyle=line if line == "--" else ":", label=f"{model}, zero-shot")
        axis.set(title=f"{group}: {sum(chosen)} task{'s' * (sum(chosen) > 1)}", xlabel="shots")
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, map(str, shots))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"accuracy in %, {MEAN}")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)

def draw_gains(table, groups, context, path):
    """The gain of context as one bar per task, sorted, with intervals over seeds."""
    shots, bars = gains(table, groups, context)
    figure, axis = plt.subplots(figsize=(6.5, 0.9 + 0.24 * len(bars)), layout="constrained")
    colors = {"seen": ("#0072B2", ""), "combined": ("#E69F00", "//"), "unseen": ("#009E73", "..")}
    for group, (color, hatch) in colors.items():
        rows = [(place, *bar) for place, bar in enumerate(bars[::-1]) if groups[bar[2]] == group]
        for i, (place, gain, width, _) in enumerate(rows):
            axis.barh(place, gain, xerr=np.nan_to_num(width), color=color, hatch=hatch, edgecolor="white", capsize=2,
                      label=f"{group}: {GROUPS[group]}" if i == 0 else None)  # fmt: skip
    axis.set_yticks(range(len(bars)), [bar[2] for bar in bars[::-1]], fontsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"{context} - {BASES[context]} at {shots} shots, points of accuracy, {MEAN}")
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)

# ---- 5. Images of your own ------------------------------------------------------------------------------------------

def open_dataset(source, root):
    """A folder with a folder of images per class, or a torchvision dataset by NAME or NAME:SPLIT, its test part by default,
    downloaded into `root` if need be. Raises UserError."""
    if Path(source).is_dir():
        try:
            return torchvision.datasets.ImageFolder(source)
        except FileNotFoundError as error:  # no class folder, or an empty one
            raise UserError(f"--data {source}: {cc.first_line(error)}") from None
    name, _, split = source.partition(":")
    kind = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise UserError(f"--data {source}: neither a folder nor a dataset of torchvision")
    known = set()
    for parent in kind.__mro__:
        parameters = inspect.signature(parent.__init__).parameters
        known |= parameters.keys()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):  # it passes nothing on
            break
    wanted = {"root": str(root), "download": True, "train": False, "background": False, "split": split or "test"}
    try:
        return kind(**{key: value for key, value in wanted.items() if key in known})
    except Exception as error:  # each of them fails in ways of its own
        raise UserError(f"--data {source}: cannot be downloaded or read ({cc.first_line(error)})") from None

def image_task(source, templates, root, seeds, shots, queries, device, settings=cc.Settings(), part=slice(None)):
    """A task of one's own images. A class's name fills the {} of each template: "0 - zero" becomes "zero", as does the
    name "0". One permutation per class and seed: the first `queries` images are queries, the next ones the support.
    `part` of each class's images is used. Raises UserError, before anything else is computed, if a class has too few images
    or one cannot be read."""
    dataset = open_dataset(source, root)
    targets = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
    if targets is None:
        targets = [dataset[i][1] for i in tqdm(range(len(dataset)), "reading labels", leave=False)]
    try:
        targets = np.array([int(target) for target in targets])
    except (TypeError, ValueError):
        raise UserError(f"--data {source}: its labels are not classes") from None
    labels = np.unique(targets)
    members = [np.flatnonzero(targets == label)[part] for label in labels]
    names = [str(dataset.classes[i]) if hasattr(dataset, "classes") else str(i) for i in labels]
    for name, found in zip(names, members):
        if len(found) < queries + shots:
            raise UserError(f"--data {source}: class {name} has {len(found)} images, {queries} queries and {shots} shots need "
                            f"{queries + shots}; lower --queries or --shots")  # fmt: skip
    order = np.stack([[np.random.default_rng([seed, c]).permutation(found)[: queries + shots]
                       for c, found in enumerate(members)] for seed in seeds])  # (seeds, C, n)  # fmt: skip
    used, place = np.unique(order, return_inverse=True)
    images, fit = [], cc.preprocess(settings)
    for i in tqdm(used.tolist(), "reading images", leave=False):
        try:
            images.append(fit(dataset[i][0]))
        except Exception as error:  # Pillow has many ways to fail
            path = dataset.samples[i][0] if hasattr(dataset, "samples") else f"image {i} of {source}"
            raise UserError(f"{path} cannot be read ({cc.first_line(error)})") from None
    images, place = torch.stack(images).to(device), torch.from_numpy(place.reshape(order.shape)).to(device)

    def readable(name):
        name = name.split(" - ")[-1].replace("_", " ")
        return cc.NUMERALS[int(name)] if name in list("0123456789") else name

    captions = [[template.replace("{}", readable(name)) for template in templates] for name in names]
    return Task(Path(source).name, "own", captions, lambda seed, *_: images[place[seeds.index(seed)].T])

# ---- 6. Command line ------------------------------------------------------------------------------------------------

fail = partial(cc.fail, program="fewshot")

def positive(text):
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)

def load_runs(paths, device):
    """[{model's name: model}, ...], a dictionary per folder, that is, per training run. Raises UserError."""
    runs = {}
    for path in paths:
        runs.setdefault(path.parent, {})[path.stem] = cc.load(path, device)
    runs = list(runs.values())
    if any(run.keys() != runs[0].keys() for run in runs):
        raise UserError("the folders of these checkpoints hold different models")
    if len({tuple(model.vocabulary) for run in runs for model in run.values()}) > 1:
        raise UserError("these models were trained on different captions: evaluate them one by one")
    return runs

def main(arguments=None):
    parser = argparse.ArgumentParser(description="Few-shot classification with the checkpoints of contextclip.py.")
    parser.error = fail
    add = partial(parser.add_argument, metavar="X")
    add("--checkpoint", nargs="+", type=Path, help="models; several folders are several training runs (all in OUT)")
    add("--shots", nargs="+", type=positive, default=[1, 2, 4, 8, 16, 32], help="images per class (1 2 4 8 16 32)")
    add("--seeds", type=positive, default=5, help="draws of support and queries, per training run (%(default)s)")
    add("--queries", type=positive, default=12, help="images per class to classify (%(default)s)")
    add("--methods", nargs="+", choices=CLASSIFIERS, help=f"of {', '.join(CLASSIFIERS)} (all)")
    add("--tasks", nargs="+", choices=TASKS, help=f"of {', '.join(TASKS)} (all)")
    add("--data", help="instead of them: a folder per class, or NAME or NAME:SPLIT of a torchvision dataset")
    add("--template", nargs="+", default=["{}"], help="captions for --data, {} is the class; several are averaged")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (%(default)s)")
    add("--out", type=Path, default=Path("runs"), help="folder for results, and of the checkpoints (%(default)s)")
    args = parser.parse_args(arguments)
    try:
        methods = [method for method in CLASSIFIERS if method in (args.methods or CLASSIFIERS)]
        device, shots = cc.choose_device(args.device), sorted(set(args.shots))
        paths = args.checkpoint or sorted(args.out.glob("*.pt"))
        if not paths:
            raise UserError(f"there is no checkpoint in {args.out}: python contextclip.py trains some")
        if missing := [template for template in args.template if "{}" not in template]:
            raise UserError(f"--template {missing[0]}: it needs a {{}} for the class")
        runs = load_runs(paths, device)
        plain = vars(args) == vars(parser.parse_args([]))  # only the command without options draws the README's figures
        figures = Path("figures") if plain else args.out
        for folder in (args.out, figures):
            cc.make_writable(folder)
        seeds = [range(run * args.seeds, (run + 1) * args.seeds) for run in range(len(runs))]
        settings = next(iter(runs[0].values())).settings
        own = partial(image_task, args.data, args.template, args.out / "data", shots=max(shots), queries=args.queries,
                      device=device, settings=settings)  # fmt: skip
        if settings.data and not args.data:
            raise UserError("these models were trained on photographs: give some to classify with --data")
        if settings.data:  # their hyper-parameters come from photographs too, half of each class's
            validation = [own(seeds=range(3), part=slice(1, None, 2))]
            tasks = [own(seeds=range(args.seeds * len(runs)), part=slice(0, None, 2))]
        else:
            tasks = [own(seeds=range(args.seeds * len(runs)))] if args.data else []
            atlas = cc.Atlas(device, settings)
            validation = validation_tasks(atlas)
            tasks = tasks or card_tasks(atlas, [task for task in TASKS if task in (args.tasks or TASKS)])
        if not tasks:
            raise UserError("these models were trained on too few characters for these tasks")
        found = [evaluate(models, tasks, validation, methods, shots, s, args.queries) for models, s in zip(runs, seeds)]
        rows, hyper = [row for rows, _ in found for row in rows], [hyper for _, hyper in found]
        with open(args.out / "fewshot.csv", "w", newline="") as file:
            csv.writer(file).writerows([("model", "task", "group", "method", "shots", "seed", "accuracy"), *rows])
        (args.out / "fewshot.json").write_text(json.dumps(hyper, indent=1))
        print(f"hyper-parameters for {shots} shots, found on {'other images of the classes' if settings.data else 'the validation tasks'} (of the first run):")
        for method, points in hyper[0].items():
            for name in points[shots[0]]:
                print(f"  {method:20}{name:6}" + " ".join(f"{points[k][name]:g}" for k in shots))
        table, groups = tabulate(rows, args.seeds)
        report(table, groups)
        if any(method == MEAN for _, method, _ in table):
            draw_curves(table, groups, figures / "accuracy_vs_shots.png")
            for _, context in pair(runs[0])[:1] if not args.data else []:
                draw_gains(table, groups, context, figures / "gain_per_task.png")
    except UserError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename} cannot be written: {error.strerror}")

if __name__ == "__main__":
    main()
