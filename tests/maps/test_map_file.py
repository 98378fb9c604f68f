"""A map's folder: one file, replaced whole, that nothing can change unseen; and what is in it must fit together."""

import json
import multiprocessing
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import grow, refused

from invented import made
from peft_pcgrow import ErrorMap, measure_errors
from peft_pcgrow.maps.map_file import FILE, write
from tiny import build, contrast, tokens


@pytest.fixture
def folder(tmp_path):
    measure_errors(build(), [tokens()], progress=False).save(tmp_path / "map")
    return tmp_path / "map"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, place=-9):
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(bytes(blob))


def edit(path, before, after):
    """Replace text of the header by other text of its length."""
    blob = path.read_bytes()
    assert before.encode() in blob
    path.write_bytes(blob.replace(before.encode(), after.encode()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (cut, ValueError, "does not have the checksum"),
        (flip, ValueError, "does not have the checksum"),
        (lambda path: path.write_text("{}"), ValueError, "does not begin with a readable header"),
        (lambda path: path.write_bytes(b""), ValueError, "does not begin with a readable header"),
        (lambda path: edit(path, "[0, 1, 2], ", "[2, 1, 0], "), ValueError, "does not have the checksum"),
        (lambda path: edit(path, '\\"tokens\\": 6', '\\"tokens\\": 7'), ValueError, "does not have the checksum"),
        (
            lambda path: edit(path, '\\"format\\": 4', '\\"format\\": 9'),
            ValueError,
            "has format 9; this version reads 4",
        ),
        (lambda path: path.unlink(), FileNotFoundError, "no error map in .*expected error_map.safetensors there"),
    ],
)
def test_damage(damage, error, text, folder):
    damage(folder / FILE)
    with pytest.raises(error, match=text):
        ErrorMap.load(folder)
    model = build()
    with refused(model, error, text):
        grow(model, error_map=folder)


@pytest.mark.slow
def test_every_byte_counts(folder):
    """No flipped bit anywhere passes."""
    whole, picked = (folder / FILE).read_bytes(), random.Random(0)
    for place in [*range(0, 400, 7), *picked.sample(range(len(whole)), 100)]:
        flip(folder / FILE, place)
        with pytest.raises(ValueError, match=r"is damaged|has format"):
            ErrorMap.load(folder)
        (folder / FILE).write_bytes(whole)
    ErrorMap.load(folder)


def test_other_window(tmp_path):
    contrast().save(tmp_path)
    edit(tmp_path / FILE, '\\"window\\": 8', '\\"window\\": 3')
    with pytest.raises(ValueError, match="does not have the checksum"):
        ErrorMap.load(tmp_path)


def test_the_older_format(tmp_path):
    """Two files, tensors and facts: measured again."""
    build_map = made()
    build_map.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / FILE)
    (tmp_path / "error_map.json").write_text("{}")
    with pytest.raises(ValueError, match="has format 2; this version reads 4: measure it again"):
        ErrorMap.load(tmp_path)
    build_map.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    ErrorMap.load(tmp_path)


# ---- facts and tensors that do not fit, under a checksum that does


def values(facts):
    """Every place in nested facts."""
    places = [((), facts)]
    while places:
        path, here = places.pop()
        if path:
            yield path
        inside = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        places += [((*path, key), value) for key, value in inside]


ODD = (None, -1, 0, 1.5, float("inf"), "x", True, [], {}, [3, 2], 10**30)


@pytest.mark.slow
@pytest.mark.parametrize("measured", [contrast, made])
def test_odd_facts(measured, tmp_path):
    """Whatever stands in a fact, a map loads and can be used, or one ValueError says what is wrong."""
    measured().save(tmp_path)
    tensors, facts = load_file(tmp_path / FILE), json.loads(_facts(tmp_path))
    refused_edits = 0
    for path in values(facts):
        for odd in (*ODD, "gone"):
            changed = json.loads(json.dumps(facts))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if odd == "gone":
                del inner[path[-1]]
            else:
                inner[path[-1]] = odd
            if path == ("format",):
                continue
            try:
                write(tmp_path, tensors, {key: value for key, value in changed.items() if key != "format"})
                used(ErrorMap.load(tmp_path))
            except ValueError:
                refused_edits += 1
    assert refused_edits > 100


def used(emap):
    str(emap)
    emap.top(3)
    if emap.has_parts:
        emap.removable()
        emap.removable("matrix")


@pytest.mark.slow
@pytest.mark.parametrize("measured", [contrast, made])
def test_odd_tensors(measured, tmp_path):
    """A tensor that is cut, flat, empty or not finite is named; one that is gone is."""
    measured().save(tmp_path)
    tensors, facts = load_file(tmp_path / FILE), json.loads(_facts(tmp_path))
    facts.pop("format")
    for name, tensor in tensors.items():
        nan = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor[:0]
        optional = name.startswith(("gradient", "shared", "hops", "words"))
        flat = [] if name in ("fold_labels", "words") else [tensor.flatten()]
        for odd in [*flat, tensor[:0], tensor.unsqueeze(0), nan, *([] if optional else [None])]:
            changed = {**tensors, name: odd} if odd is not None else {k: t for k, t in tensors.items() if k != name}
            write(tmp_path, changed, facts)
            with pytest.raises(ValueError, match=r"is damaged \(.*(fit|missing|finite|different stacks)"):
                ErrorMap.load(tmp_path)
    write(tmp_path, {**tensors, "more": torch.ones(1)}, facts)
    with pytest.raises(ValueError, match="tensor more belongs to no map"):
        ErrorMap.load(tmp_path)


def _facts(folder):
    blob = (folder / FILE).read_bytes()
    return json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]["facts"]


def test_a_map_that_is_not_finite(tmp_path):
    """It is not written over the one that is there."""
    made().save(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(made(), loss=float("nan")).save(tmp_path)
    assert ErrorMap.load(tmp_path).loss == 2400.0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# ---- writers and readers at once


def write_often(folder, seed):
    for _ in range(30):
        made(seed=seed).save(folder)


@pytest.mark.slow
def test_writers_at_once(tmp_path):
    """While two processes write, every reader finds one map or the other, whole; nothing else stays."""
    made(seed=1).save(tmp_path)
    known = [made(seed=seed).mass for seed in (1, 2)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    read = 0
    while any(writer.is_alive() for writer in writers):
        mass = ErrorMap.load(tmp_path).mass
        assert any(torch.equal(mass, each) for each in known)
        read += 1
    for writer in writers:
        writer.join()
        assert not writer.exitcode
    assert read
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_interrupted(folder, monkeypatch):
    """The map from before stays, and can be used."""
    before = ErrorMap.load(folder)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made().save(folder)
    monkeypatch.undo()
    assert torch.equal(ErrorMap.load(folder).mass, before.mass)
    assert [path.name for path in folder.iterdir()] == [FILE]
