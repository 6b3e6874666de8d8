"""How a sound file becomes a hostile one; every choice comes from the generator given."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Values that lengths, offsets and counts are overwritten with.
_NUMBERS = (0, 1, 2, 127, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_HUGE = (*_NUMBERS, 1 << 40, (1 << 62), (1 << 63) - 1, (1 << 64) - 1)


def mutate(folder: Path, kind: str, rng: random.Random, outside: Path, canary: str) -> str:
    """Change one or two files of ``folder``; returns the mutation's name.

    Args:
        folder: a copy of the sound files.
        kind: what they are.
        rng: of all choices.
        outside: a file that links and names are made to lead to.
        canary: part of the name of a file that hostile code would make.
    """
    own = {
        "shard": [tar_headers, tar_members, tar_bomb, tar_names],
        "index": [zip_edit, npz_arrays, zip_bomb],
        "cache": [json_edit, json_edit, json_text, link],
        "checkpoint": [zip_edit, zip_edit, zip_bomb, pickled, torch_values],
        "config": [yaml_edit, yaml_edit, yaml_text, yaml_bomb],
        "export": [json_edit, json_edit, json_edit, json_text, link, safetensors_edit, stranger],
        "manifest": [json_edit, json_edit, json_text, link],
    }[kind]
    chosen: Callable[..., None] = rng.choice([bits, cut, splice, lengths, *own, *own])
    chosen(folder, rng, outside, canary)
    return chosen.__name__


# Not what the readers are tried with: parts that they only pass over.
_NOT = ("a.tar", ".tar", ".index.npz", ".md", ".py")


def _target(folder: Path, rng: random.Random, *suffixes: str) -> Path:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
    if suffixes:
        files = [p for p in files if p.name.endswith(suffixes)] or files
    elif folder.name == "shard":
        return folder / "a.tar"
    elif folder.name == "index":
        return folder / "a.tar.index.npz"
    else:
        files = [p for p in files if not p.name.endswith(_NOT)] or files
    return rng.choice(files)


def bits(folder: Path, rng: random.Random, *_: Any) -> None:
    """Flip some bits, or overwrite a run of bytes, mostly where headers are."""
    path = _target(folder, rng)
    data = bytearray(path.read_bytes())
    for _turn in range(rng.choice((1, 1, 2, 8, 64))):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 2048)
        place = rng.randrange(reach) if rng.random() < 0.8 else len(data) - 1 - rng.randrange(reach)
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(folder: Path, rng: random.Random, *_: Any) -> None:
    """End the file anywhere, or right at the start or the end."""
    path = _target(folder, rng)
    data = path.read_bytes()
    place = rng.choice((0, 1, 8, len(data) - 1, len(data) // 2, rng.randrange(len(data))))
    path.write_bytes(data[:place])


def splice(folder: Path, rng: random.Random, *_: Any) -> None:
    """Put a piece of a file elsewhere in it, take one out, or double it."""
    path = _target(folder, rng)
    data = path.read_bytes()
    size = rng.randrange(1, max(2, min(4096, len(data))))
    start = rng.randrange(max(1, len(data) - size))
    to = rng.randrange(len(data))
    piece = data[start : start + size] if rng.random() < 0.7 else rng.randbytes(size)
    end = to + (size if rng.random() < 0.5 else 0)
    path.write_bytes(data[:to] + piece * rng.choice((0, 1, 1, 3)) + data[end:])


def lengths(folder: Path, rng: random.Random, *_: Any) -> None:
    """Overwrite a machine word with a number that is a bad length."""
    path = _target(folder, rng)
    data = bytearray(path.read_bytes())
    form = rng.choice(("<I", ">I", "<Q", ">Q", "<H"))
    width = struct.calcsize(form)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 1024)
    place = rng.randrange(max(1, reach - width))
    if rng.random() < 0.3:
        place = max(0, len(data) - width - rng.randrange(min(200, len(data))))
    value = rng.choice(_HUGE) & ((1 << (8 * width)) - 1)
    data[place : place + width] = struct.pack(form, value)
    path.write_bytes(data)


# --- tar -------------------------------------------------------------------------------------


def _checksum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def tar_headers(folder: Path, rng: random.Random, *_: Any) -> None:
    """Change fields of a header and put its checksum right."""
    path = folder / "a.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    for _turn in range(rng.choice((1, 1, 3))):
        at = rng.choice(offsets)
        header = bytearray(data[at : at + 512])
        field = rng.randrange(5)
        if field == 0:  # size, in octal or in base 256
            value = rng.choice(_HUGE)
            octal = b"%011o\0" % value
            wide = b"\x80" + value.to_bytes(11, "big")
            header[124:136] = octal if len(octal) == 12 and rng.random() < 0.5 else wide
            if rng.random() < 0.2:
                header[124:136] = b"\xff" * 12  # negative
        elif field == 1:
            header[156] = rng.choice(b"0123456789LKxgSXNVMD\x00\xff")
        elif field == 2:
            name = rng.choice((b"../../x.jpg", b"/etc/x.jpg", b"a\x00b.jpg", b"", b"\xff" * 99))
            header[0:100] = name.ljust(100, b"\0")[:100]
        elif field == 3:
            header[257:265] = rng.choice(
                (b"ustar  \0", b"ustar\x0000", b"\0" * 8, rng.randbytes(8))
            )
        else:
            place = rng.randrange(512)
            header[place] = rng.randrange(256)
        if rng.random() < 0.9:
            _checksum(header)
        data[at : at + 512] = header
    path.write_bytes(data)


def _append(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    whole = (folder / "a.tar").read_bytes().rstrip(b"\0")
    padded = whole + b"\0" * (-len(whole) % 512)
    (folder / "a.tar").write_bytes(buffer.getvalue()[: -len(b"\0" * 1024)] + padded + b"\0" * 1024)


def tar_members(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """Links, devices, names that lead away, empty and doubled members."""
    members = []
    for number in range(rng.randrange(1, 6)):
        info = tarfile.TarInfo(f"m{number}.jpg")
        data = rng.choice((b"", b"\xff\xd8\xff", rng.randbytes(50)))
        what = rng.randrange(6)
        if what == 0:
            info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))
            info.linkname, data = str(outside), b""
        elif what == 1:
            info.type = rng.choice((tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE))
            data = b""
        elif what == 2:
            info.name = rng.choice(
                (f"../../{canary}.jpg", f"/tmp/{canary}.jpg", "..\\x.jpg", "a/../b.jpg")
            )
        elif what == 3:
            info.name = "m0.jpg"
        elif what == 4:
            info.name = (
                f"m{number}.{rng.choice(('cls', 'json', 'npy', 'pyd', 'pickle', 'pth', 'zz'))}"
            )
            data = rng.choice(
                (b"9" * 400, b"[" * 5000, b"-1", b"nan", pickle.dumps(1), b'{"label": 1e400}')
            )
        info.size = len(data)
        members.append((info, data))
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    _append(folder, members, form)


def tar_names(folder: Path, rng: random.Random, *_: Any) -> None:
    """Long and strange names and pax records."""
    info = tarfile.TarInfo(
        rng.choice(("a" * 300 + ".jpg", "\u0000.jpg", "é" * 200 + ".jpg", "." * 50))
    )
    info.pax_headers = {
        rng.choice(
            ("size", "path", "GNU.sparse.map", "GNU.sparse.size", "mtime", "hdrcharset")
        ): rng.choice(("-1", "9" * 30, "1,2,3", "x", "BINARY", "../../x.jpg", "1e9"))
    }
    info.size = 3
    _append(folder, [(info, b"abc")], tarfile.PAX_FORMAT)


def tar_bomb(folder: Path, rng: random.Random, *_: Any) -> None:
    """Headers that promise gigabytes; compressed archives; chains of headers."""
    path = folder / "a.tar"
    what = rng.randrange(4)
    if what == 0:
        import gzip

        path.write_bytes(gzip.compress(path.read_bytes() + b"\0" * rng.choice((0, 1 << 24))))
        return
    header = bytearray(tarfile.TarInfo("x.jpg").tobuf())
    header[156] = rng.choice(b"xgLKX")
    size = rng.choice((1 << 20, 1 << 33, 1 << 40, (1 << 63) - 1))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    _checksum(header)
    if what == 1:
        path.write_bytes(bytes(header) + path.read_bytes())
    elif what == 2:
        path.write_bytes(bytes(header) * 3000 + path.read_bytes())
    else:
        header[124:136] = b"%011o\0" % 0
        _checksum(header)
        path.write_bytes(bytes(header) * 5000 + path.read_bytes())


# --- zip: indexes and checkpoints ------------------------------------------------------------


def _entries(path: Path) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def _write_zip(
    path: Path, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def zip_edit(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """Change what is inside, with every checksum right."""
    path = _target(folder, rng, ".npz", ".ckpt")
    entries = [(info.filename, data) for info, data in _entries(path)]
    place = rng.randrange(len(entries))
    if rng.random() < 0.6:  # where the structure is: small entries
        small = [i for i, (_, data) in enumerate(entries) if len(data) < 1 << 16]
        place = rng.choice(small or [place])
    name, data = entries[place]
    changed = bytearray(data)
    what = rng.randrange(6)
    if what == 0:
        for _turn in range(rng.choice((1, 2, 16))):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif what == 1:
        changed = changed[: rng.randrange(len(changed) + 1)]
    elif what == 2 and changed:
        at = rng.randrange(max(1, len(changed) - 8))
        changed[at : at + 8] = struct.pack("<Q", rng.choice(_HUGE))
    elif what == 3:
        entries.pop(place)
        _write_zip(path, entries)
        return
    elif what == 4:
        name = rng.choice((f"../../{canary}", f"/tmp/{canary}", "x", name + "x"))
    else:
        entries.append((name, bytes(rng.randbytes(20))))
    entries[place] = (name, bytes(changed))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _write_zip(path, entries)


def zip_bomb(folder: Path, rng: random.Random, *_: Any) -> None:
    """An entry that is compressed a thousandfold, or says that it is larger than it is."""
    path = _target(folder, rng, ".npz", ".ckpt")
    entries = [(info.filename, data) for info, data in _entries(path)]
    place = max(range(len(entries)), key=lambda i: len(entries[i][1]))
    if rng.random() < 0.5:
        name = entries[place][0]
        entries[place] = (name, entries[place][1][:128] + b"\0" * (1 << rng.choice((20, 26, 29))))
        _write_zip(path, entries, zipfile.ZIP_DEFLATED)
        return
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")  # the last entry of the central directory
    form, where = rng.choice(
        (("<I", 20), ("<I", 24), ("<I", 42), ("<H", 28), ("<H", 30), ("<H", 10))
    )
    value = rng.choice(_NUMBERS) & ((1 << (8 * struct.calcsize(form))) - 1)
    data[at + where : at + where + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(data)


def npz_arrays(folder: Path, rng: random.Random, *_: Any) -> None:
    """An index whose arrays contradict one another, promise more, or are of other types."""
    import numpy as np

    path = folder / "a.tar.index.npz"
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = rng.choice(sorted(arrays))
    what = rng.randrange(5)
    if name == "header" or what == 0:
        header = json.loads(arrays["header"].tobytes())
        _change(header, rng)
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    elif what == 1:
        array = arrays[name].copy()
        value = rng.choice(_HUGE) & 0x7FFFFFFFFFFFFFFF
        array[rng.randrange(len(array))] = value if array.dtype.itemsize == 8 else value & 0x7F
        arrays[name] = array if rng.random() < 0.8 else -array
    elif what == 2:
        arrays[name] = arrays[name].astype(rng.choice(("f8", "i1", "O", "U5", "c16", ">i8")))
    elif what == 3:
        arrays[name] = rng.choice(
            (arrays[name][:-1], arrays[name][:0], np.array(3), arrays[name][None])
        )
    np.savez_compressed(path, **arrays)
    if what == 4:  # a header of an array that promises terabytes
        entries = [(info.filename, data) for info, data in _entries(path)]
        place = rng.randrange(len(entries))
        entry, data = entries[place]
        old = data[10 : data.index(b"\n", 10)]
        shape = b"(%d,)" % rng.choice((1 << 40, 1 << 62, 10**30))
        new = old[: old.index(b"(")] + shape + b", }"
        entries[place] = (entry, data[:10] + new.ljust(len(old)) + data[10 + len(old) :])
        _write_zip(path, entries, zipfile.ZIP_DEFLATED)


class _Run:
    """Unpickled, it would make the canary."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def pickled(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """Code where the pickle is, in each of torch's formats."""
    path = folder / "c.ckpt"
    hostile = _Run(str(outside.parent / canary))
    what = rng.randrange(4)
    if what == 0:
        path.write_bytes(pickle.dumps(hostile, protocol=rng.randrange(6)))
        return
    import torch

    if what == 1:
        torch.save({"state_dict": hostile}, path)
    elif what == 2:
        torch.save(
            {"multikd": hostile, "a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False
        )
    else:
        entries = [(info.filename, data) for info, data in _entries(path)]
        name = next(name for name, _ in entries if name.endswith("data.pkl"))
        bombs = (
            pickle.dumps(hostile),
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + b"\xff" * 5 + b"\x00\x85R.",
        )
        _write_zip(path, [(n, rng.choice(bombs) if n == name else d) for n, d in entries])


def torch_values(folder: Path, rng: random.Random, *_: Any) -> None:
    """A checkpoint of plain values of other types and shapes."""
    import torch

    path = folder / "c.ckpt"
    content = torch.load(path, weights_only=True)
    what = rng.randrange(5)
    if what == 0:
        content[rng.choice(sorted(content))] = _value(rng)
    elif what == 1:
        state = content["state_dict"]
        key = rng.choice(sorted(state))
        state[key] = rng.choice(
            (
                torch.zeros(1).expand(1 << 40),
                torch.zeros(3, device="meta"),
                torch.eye(3).to_sparse(),
                torch.zeros(0),
                "text",
                None,
            )
        )
    elif what == 2:
        state = content["state_dict"]
        state.pop(rng.choice(sorted(state)))
    else:
        import yaml

        text = content["multikd"]["config"]
        config = yaml.safe_load(text)
        _change(config.get("model", config) if rng.random() < 0.7 else config, rng)
        content["multikd"]["config"] = rng.choice(
            (yaml.safe_dump(config),) * 4 + (text[: len(text) // 2],)
        )
        if what == 4:
            config = yaml.safe_load(text)
            student = config["model"]["init_args"]["student"]["init_args"]
            student["model_args"] = rng.choice(_MODEL_ARGS)
            content["multikd"]["config"] = yaml.safe_dump(config)
    torch.save(content, path)


_MODEL_ARGS: tuple[dict[str, Any], ...] = (
    {"depth": 10**9},
    {"depth": 10**5, "embed_dim": 64},
    {"embed_dim": 1 << 20, "num_heads": 1},
    {"embed_dim": 1 << 16, "num_heads": 1},
    {"depths": [10**6] * 4},
    {"mlp_ratio": 1e12},
    {"reg_tokens": 10**9},
    {"embed_dim": -3},
    {"depth": "12"},
    {"num_heads": 0},
    {"norm_layer": "os.system"},
    {"nest": [[[[[[1]]]]]]},
)


# --- JSON, YAML, folders ---------------------------------------------------------------------


def _value(rng: random.Random) -> Any:
    return rng.choice(
        (
            *(None, True, -1, 0, 1e308, float("nan"), 10**40, 1 << 62, "", "x" * 5000, [], {}),
            *([1] * 50, {"a": {"b": []}}, [[]], "../../x", "/etc/passwd", "\u0000", "os.system"),
            *("subprocess.Popen", "pipe:touch x", "https://a:b@c/d?token=e", 2, 3, [0], [-1, 2]),
        )
    )


def _change(value: Any, rng: random.Random) -> None:
    """Change one thing somewhere in nested lists and mappings, in place."""
    places: list[tuple[Any, Any]] = []

    def walk(item: Any) -> None:
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        for key, inner in list(pairs):
            places.append((item, key))
            if isinstance(inner, dict | list) and inner:
                walk(inner)

    walk(value)
    if not places:
        return
    for _ in range(rng.choice((1, 1, 1, 2))):
        container, key = rng.choice(places)
        what = rng.randrange(6)
        try:
            old = container[key]
        except (KeyError, IndexError):
            continue
        if what == 0 and isinstance(container, dict):
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[str(_value(rng))[:50]] = container.pop(key)
        elif what == 2 and isinstance(old, int) and not isinstance(old, bool):
            container[key] = rng.choice((-old, old + 1, old * 10**6, 1 << 31, 1 << 40, float(old)))
        else:
            container[key] = _value(rng)


def json_edit(folder: Path, rng: random.Random, *_: Any) -> None:
    """Another value, key or type somewhere; or a model that would be gigantic."""
    path = _target(folder, rng, ".json", ".jsonl")
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "config.json" and rng.random() < 0.3:
        content["model_args"] = rng.choice(_MODEL_ARGS)
    elif path.name == "heads.json" and rng.random() < 0.3:
        text = json.dumps(content)
        for width in ("64", "32"):
            text = text.replace(f": {width}", f": {rng.choice((10**6, 10**9, -1, 0))}")
        content = json.loads(text)
    else:
        _change(content, rng)
    path.write_text(json.dumps(content), encoding="utf-8")


def json_text(folder: Path, rng: random.Random, *_: Any) -> None:
    """Text that is no such JSON: too deep, too long numbers, other encodings, duplicates."""
    path = _target(folder, rng, ".json")
    bad = (
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b"\xff\xfe{\x00}\x00",
        b"null",
        b"[]",
        b"3",
    )
    path.write_bytes(
        rng.choice((*bad, b'"text"', b"", b"{}", b"NaN", b'{"teachers": 1}', b"\xef\xbb\xbf{}"))
    )


def link(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """A file of the folder is a link to one outside, to a device, or to itself."""
    path = _target(folder, rng)
    path.unlink()
    path.symlink_to(rng.choice((outside, Path("/dev/zero"), path, Path("/dev/null"), folder)))


def safetensors_edit(folder: Path, rng: random.Random, *_: Any) -> None:
    """A header with other offsets, shapes, types and names; or one that promises gigabytes."""
    path = _target(folder, rng, ".safetensors")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.3:
        path.write_bytes(struct.pack("<Q", rng.choice(_HUGE)) + data[8:])
        return
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in sorted(header) if key != "__metadata__"])
    what = rng.randrange(5)
    if what == 0:
        header[name]["shape"] = rng.choice(([1 << 40], [1 << 62, 4], [], [-1], [0]))
    elif what == 1:
        header[name]["data_offsets"] = rng.choice(([0, 1 << 40], [8, 0], [-1, 4], [0, 0]))
    elif what == 2:
        header[name]["dtype"] = rng.choice(("F64", "I8", "BF16", "BOOL", "X", "F8_E4M3", 3))
    elif what == 3:
        header[rng.choice(("x", "", "../x", "__metadata__"))] = header.pop(name)
    else:
        _change(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def stranger(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """Code beside the weights, or pickles in their place."""
    import torch

    hostile = _Run(str(outside.parent / canary))
    code = f"import os\nos.mkdir({str(outside.parent / canary)!r})\n"
    for name in ("student_heads.py", "sitecustomize.py", "timm.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(code, encoding="utf-8")
    if rng.random() < 0.6:
        (folder / "model.safetensors").unlink()
        torch.save(hostile, folder / rng.choice(("pytorch_model.bin", "model.pth", "x.pth.tar")))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= rng.choice(
        (
            {"file": str(folder / "pytorch_model.bin")},
            {"url": f"file://{folder}/pytorch_model.bin"},
            {"custom_load": True},
            {"hf_hub_id": "../../x", "source": "hf-hub"},
            {"state_dict": {"a": 1}},
        )
    )
    if rng.random() < 0.3:
        config["architecture"] = rng.choice(
            ("local-dir:/etc", "hf-hub:x/y", "resnet50", "", "os.system")
        )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def yaml_edit(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """Other values and classes, some of which run commands elsewhere."""
    import yaml

    path = folder / "c.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    target = str(outside.parent / canary)
    hostile = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", target]}}
    what = rng.randrange(6)
    if what == 0:
        name = rng.choice(("optimizer", "loss", "student", "projectors", "dropper", "schedule"))
        config["model"][name] = rng.choice(
            (hostile, "os.abort", "subprocess.Popen", "builtins.exit")
        )
    elif what == 1:
        encoder = rng.choice(
            ("os.abort", "builtins.breakpoint", "sys.exit", f"exported:{folder}", hostile)
        )
        config["model"]["teachers"]["vit"]["init_args"] = {"encoder": encoder}
    elif what == 2:
        hook = {"on_fit_start": rng.choice(("os.abort", "os.system")), "setup": hostile}
        callback = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": hook}
        config["trainer"]["callbacks"] = rng.choice(([hostile], [callback], hostile, "os.abort"))
    elif what == 3:
        config["data"] |= {
            "train": f"pipe:mkdir {target}",
            "sequential": True,
            "allow_pipe": True,
            "epoch_batches": 1,
        }
    else:
        _change(config, rng)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def yaml_text(folder: Path, rng: random.Random, outside: Path, canary: str) -> None:
    """Tags that unsafe loaders run, and text that is no config."""
    path = folder / "c.yaml"
    target = outside.parent / canary
    tags = (
        f'model: !!python/object/apply:os.mkdir ["{target}"]\n',
        f'!!python/object/new:subprocess.Popen [["mkdir", "{target}"]]\n',
        "model: !!binary 3\n",
        "a: !!timestamp x\n",
        "? [a]\n: b\n",
        "? {a: b}\n: c\n",
        "model: !!int x\n",
        "a: " + "9" * 10_000 + "\n",
        "[" * 5000,
        "a: &a [*a]\n",
        "model: c.yaml\n",
        "data: " + "x" * 1000 + ".yaml\n",
        "\x00",
        "- 1\n",
        "a: 0b2\nb: 0o9\nc: 1:99:99\n",
        "<<: 3\n",
        "model: 'file\\0.yaml'\n",
        "\ufeffmodel: 3\n",
    )
    path.write_text(rng.choice(tags), encoding="utf-8")


def yaml_bomb(folder: Path, rng: random.Random, *_: Any) -> None:
    """A billion laughs: by sequences, by mappings, by merges, by long texts."""
    path = folder / "c.yaml"
    deep = rng.choice((9, 12, 30))
    lines = [f"a0: &a0 {rng.choice(('x', 'lol' * 1000))}"]
    for n in range(1, deep):
        refs = ", ".join([f"*a{n - 1}"] * 10)
        pairs = ", ".join(f"k{i}: *a{n - 1}" for i in range(10))
        lines.append(f"a{n}: &a{n} " + (f"[{refs}]" if rng.random() < 0.5 else f"{{{pairs}}}"))
    if rng.random() < 0.3:
        lines = ["m0: &m0 {a: 1}"]
        lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, deep)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
