"""Changes that `fuzz_readers.py` makes to valid files: a change is written as FILE:NUMBER, and the number decides it.

What is changed depends on the kind of file: values of JSON, entries of a safetensors header, counts and lengths of a
GGUF header, the header of an array, lines of text, the opcodes of a pickle; and of any file bytes, its length and what
kind of file it is.
"""

import hashlib
import io
import json
import math
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS: list[Any] = [
    0, -1, -2, 1, 2, 3, 5, 7, 8, 16, 32, 1000, 2**20, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**12,
    10**40, -(10**18), 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf,
]  # fmt: skip
TEXTS = [
    "", "4", "gptq", "gptq_v2", "pack-quantized", "compressed-tensors", "mlx", "affine", "awq", "gemm", "auto-round",
    "auto_round:auto_gptq", "modelopt", "NVFP4", "fp8", "float-quantized", "int-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "group", "channel", "token", "tensor", "tensor_group", "block", "int",
    "float", "dynamic", "local", "cpu", "bits", "group_size", "quant_method", "quantization_config", "text_config",
    "config_groups", "weights", "targets", "ignore", "format", "llama", "mixtral", "gpt2", "bert", "t5", "gelu",
    "LlamaForCausalLM", "AutoModel", "float16", "bfloat16", "float8_e4m3fn", "int8", "torch.load", "Linear", "../x",
    "/etc/passwd", "/dev/zero", "a/b/../../c", ".", "~", "C:\\x", "a\nb\x1b[31mred", "\u202eabc", "\ud800", "\0",
    "<script>alert(1)</script>", "$\\frac{", "{{ 7*7 }}", "{% for x in range(10**9) %}a{% endfor %}",
    "{{ messages.__class__.__mro__ }}", "(a|aa)+$", "(x+x+)+y", "(a{900}){900}", "[", "re:(.*.*)*z", "re:(?i)",
    "-:.*", "+:.*", "x" * 5000, "\U0001f600", "e\u0301", "1e400", "NaN", "True", "None", "0x10",
]  # fmt: skip
DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4",
    "C64", "U32", "", "I1024", 5, None,
]  # fmt: skip
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U32": 4}  # fmt: skip
FIELDS = [0, 1, 2, 5, 8, 9, 31, 32, 255, 2**20, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
RAW = [b"", b"{", b"null", b"[]", b"{}", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"[" * 100_000,
       b'{"a":' * 900 + b"1",
       b'{"bits": ' + b"9" * 5000 + b"}", b'{"a": NaN, "a": 2}', b"\x00" * 64]  # fmt: skip
KINDS = ["folder", "pipe", "link outside", "link to a device", "link to itself", "gone", "link to nothing"]
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's kinds of values
OPCODES = [
    b"c" + b"os\nsystem\n", b"cbuiltins\neval\n", b"R", b".", b"N", b"}", b"]", b"(", b"t", b"\x85", b"b", b"q\x00",
    b"h\x00", b"ctorch._utils\n_rebuild_tensor_v2\n", b"Q", b"\x8a\x08" + b"\xff" * 8, b"X\xff\xff\xff\x7f",
    b"ctorch\nbfloat16\n", b"K\x00", b"J\xff\xff\xff\x7f",
]  # fmt: skip
# A change of a file's content: bytes, and what draws -> bytes.
Editor = Callable[[bytes, random.Random], bytes]


def apply(folder: Path, edits: tuple[tuple[str, int], ...], seeds: dict[str, Path], outside: Path) -> None:
    """Make these changes, one after another, to the files of `folder`; those of a file that is gone are left out.

    Args:
        edits: (path in the folder, number) each.
        seeds: folders whose files may take the place of others.
        outside: a file that must never be read.
    """
    for name, number in edits:
        file, draw = folder / name, random.Random(number)
        if not file.is_file() or file.is_symlink():
            continue
        kind = draw.random()
        if kind < 0.03:
            change_kind(file, draw.choice(KINDS), outside)
        elif kind < 0.07:
            _replace(file, draw, seeds)
        else:
            content = file.read_bytes()
            editors = [*EDITORS.get(file.suffix, ()), *ANY]
            weights = [6] * (len(editors) - len(ANY)) + [1] * len(ANY)
            file.write_bytes(draw.choices(editors, weights)[0](content, draw))


def change_kind(file: Path, kind: str, outside: Path) -> None:
    """Replace a file by a folder, pipe or link, or remove it."""
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "gone":
        targets: dict[str, str | Path] = {
            "link outside": outside,
            "link to a device": "/dev/zero",
            "link to itself": file.name,
        }
        file.symlink_to(targets.get(kind, "nothing-here"))


def _replace(file: Path, draw: random.Random, seeds: dict[str, Path]) -> None:
    """Put another input's file in the place of this one: of the same name or ending, or now and then any."""
    folder = seeds[draw.choice(sorted(seeds))]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    alike = [path for path in files if path.name == file.name] or [p for p in files if p.suffix == file.suffix]
    shutil.copy(draw.choice(alike if alike and draw.random() < 0.8 else files), file)


# --- any file ---------------------------------------------------------------------------------------------------------


def _bytes(content: bytes, draw: random.Random) -> bytes:
    """Change or insert a few bytes, half of them among the first 400, where headers are."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(len(made) if draw.random() < 0.5 else min(len(made), 400), 1))
        new = bytes([draw.choice([0, 255, 1 << draw.randrange(8), draw.randrange(256)])])
        made[at : at + draw.choice([0, 1, 1])] = new
    return bytes(made)


def _bit(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content)
    if made:
        made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    return bytes(made)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _grow(content: bytes, draw: random.Random) -> bytes:
    """Append bytes, or repeat a piece."""
    at = draw.randrange(len(content) + 1)
    piece = content[at : at + draw.randint(1, 64)]
    return (
        content + draw.choice([b"\0" * draw.choice([1, 7, 4096]), b"\n", content[-64:]])
        if draw.random() < 0.5
        else (content[:at] + piece * draw.choice([1, 2, 100]) + content[at:])
    )


def _splice(content: bytes, draw: random.Random) -> bytes:
    """Copy a few bytes over others nearby, such as one name of a header over another."""
    start, size = draw.randrange(len(content) + 1), draw.choice([4, 8, 24, 64])
    to = max(start + draw.randint(-400, 400), 0)
    return content[:to] + content[start : start + size] + content[to + size :]


def _raw(content: bytes, draw: random.Random) -> bytes:
    return draw.choice(RAW)


ANY: tuple[Editor, ...] = (_bytes, _bit, _cut, _grow, _splice, _raw)


# --- JSON -------------------------------------------------------------------------------------------------------------


def hostile_value(draw: random.Random, depth: int = 0) -> Any:
    """A value that no reader expects."""
    kind = draw.random()
    if kind < 0.35:
        return draw.choice(NUMBERS)
    if kind < 0.7:
        return draw.choice(TEXTS)
    if kind < 0.82 or depth > 2:
        return draw.choice([None, True, False, [], {}])
    inner = [hostile_value(draw, depth + 1) for _ in range(draw.randint(1, 3))]
    return inner if draw.random() < 0.5 else {draw.choice(TEXTS): value for value in inner}


def _places(tree: Any, draw: random.Random) -> list[tuple[Any, Any]]:
    """Return the (object or list, key) on a random way down a tree."""
    found: list[tuple[Any, Any]] = []
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
        if not keys or (found and draw.random() < 0.25):
            return found
        key = draw.choice(keys)
        found.append((tree, key))
        tree = tree[key]


def change_tree(tree: Any, draw: random.Random) -> str:
    """Change something in a JSON tree; return what to write before its closing brace, "" or a key once more."""
    places = _places(tree, draw)
    if not places:
        return ""
    parent, key = places[-1]
    kind, value = draw.random(), parent[key]
    if kind < 0.1:
        del parent[key]
    elif kind < 0.18 and isinstance(parent, dict):
        parent[str(draw.choice(TEXTS))] = parent.pop(key)
    elif kind < 0.3 and type(value) in (int, float):
        parent[key] = draw.choice([value + 1, value - 1, -value, value * 2, value * 10**6, str(value), float(value)])
    elif kind < 0.4:
        parent[key] = draw.choice([[value], {"a": value}, str(value), [value, value], not value])
    elif kind < 0.48:
        other, at = _places(tree, draw)[-1]
        parent[key] = other[at] if other is not tree or draw.random() < 0.5 else hostile_value(draw)
    elif kind < 0.54 and isinstance(tree, dict):
        return f", {json.dumps(draw.choice(list(tree) or ['a']))}: {json.dumps(hostile_value(draw))}"
    elif kind < 0.6 and isinstance(parent, dict):
        parent[str(draw.choice(TEXTS))] = hostile_value(draw)
    else:
        parent[key] = hostile_value(draw)
    return ""


def _json(content: bytes, draw: random.Random) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, draw)
    again = ""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        again = change_tree(tree, draw) or again
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):  # a tree that holds itself
        return _bytes(content, draw)
    return (text[:-1] + again + "}" if again and text.endswith("}") else text).encode("utf-8", "surrogatepass")


def _lines(content: bytes, draw: random.Random) -> bytes:
    """Change one line of JSON, drop, double or move one; half the time with the checksum that a journal would have."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    at, kind = draw.randrange(len(lines)), draw.random()
    if kind < 0.1:
        del lines[at]
    elif kind < 0.2:
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif kind < 0.25:
        lines[at] = lines[at].rstrip(b"\n")
    else:
        line = _json(lines[at], draw)
        try:
            tree = json.loads(line)
            if isinstance(tree, dict) and "sha256" in tree and "entry" in tree and draw.random() < 0.7:
                text = json.dumps(tree["entry"], sort_keys=True).encode("utf-8", "surrogatepass")
                line = json.dumps({**tree, "sha256": hashlib.sha256(text).hexdigest()}).encode()
        except (ValueError, TypeError, RecursionError):
            pass
        lines[at] = line + b"\n"
    return b"".join(lines)


# --- safetensors, GGUF ------------------------------------------------------------------------------------------------


def _header(content: bytes, draw: random.Random) -> bytes:
    """Change an entry of a safetensors header."""
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        _change_entry(header, draw.choice(names), draw)
        text = json.dumps(header).encode()
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, AttributeError):  # of earlier changes
        return _bytes(content, draw)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _change_entry(header: dict[str, Any], name: str, draw: random.Random) -> None:
    entry = header[name]
    how = draw.choice(["dtype", "shape", "offsets", "relabel", "reshape", "rename", "drop", "copy", "swap", "metadata"])
    if how == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif how in ("shape", "offsets"):
        numbers = entry["shape" if how == "shape" else "data_offsets"]
        if numbers and draw.random() < 0.8:
            numbers[draw.randrange(len(numbers))] = draw.choice(NUMBERS)
        else:
            numbers.append(draw.choice(NUMBERS))
    elif how == "relabel":  # as another dtype of the same bytes
        before, after = ITEM_BYTES[entry["dtype"]], draw.choice(sorted(ITEM_BYTES))
        if entry["shape"] and entry["shape"][-1] * before % ITEM_BYTES[after] == 0:
            entry["shape"][-1] = entry["shape"][-1] * before // ITEM_BYTES[after]
            entry["dtype"] = after
    elif how == "reshape":
        shape = entry["shape"]
        entry["shape"] = draw.choice([shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1]])
    elif how == "drop":
        del header[name]
    elif how == "swap":
        other = draw.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], entry
    elif how == "metadata":
        header["__metadata__"] = hostile_value(draw)
    else:
        text = draw.choice(TEXTS)
        header[text if draw.random() < 0.3 else f"{name}{text}"] = entry if how == "copy" else header.pop(name)


def _header_length(content: bytes, draw: random.Random) -> bytes:
    return draw.choice(FIELDS).to_bytes(8, "little") + content[8:]


class _Fields:
    """Walks through a GGUF header, which may be damaged, and notes where its numbers are."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0
        self.found: list[tuple[int, int]] = []  # (offset, bytes)

    def number(self, size: int) -> int:
        value = int.from_bytes(self._content[self._at : self._at + size], "little")
        if self._at + size <= len(self._content):
            self.found.append((self._at, size))
        self._at += size
        return value

    def text(self) -> None:
        self._at += self.number(8)

    def value(self, kind: int) -> None:
        if kind in SCALARS:
            self.number(SCALARS[kind])
        elif kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.number(4), self.number(8)
            for _ in range(min(count, 10_000)):
                self.value(inner)

    def tensor(self) -> None:
        self.text()
        for _ in range(min(self.number(4), 8)):
            self.number(8)
        self.number(4)
        self.number(8)


def gguf_fields(content: bytes) -> list[tuple[int, int]]:
    """Return (offset, bytes) of the numbers in a GGUF header: counts, lengths, types, values, dimensions, offsets."""
    fields = _Fields(content)
    fields.number(4)
    fields.number(4)
    tensors, keys = fields.number(8), fields.number(8)
    for _ in range(min(keys, 100)):
        fields.text()
        fields.value(fields.number(4))
    for _ in range(min(tensors, 100)):
        fields.tensor()
    return fields.found


def _gguf_field(content: bytes, draw: random.Random) -> bytes:
    fields = gguf_fields(content)
    if not fields:
        return _bytes(content, draw)
    start, size = draw.choice(fields)
    before = int.from_bytes(content[start : start + size], "little")
    after = draw.choice([*FIELDS, before + 1, before - 1, before * 2, before ^ (1 << draw.randrange(8 * size))])
    written = int(after % 2 ** (8 * size)).to_bytes(size, "little")
    return content[:start] + written + content[start + size :]


# --- archives, pickles, text ------------------------------------------------------------------------------------------


def _member(content: bytes, draw: random.Random) -> bytes:
    """Change a member of a zip archive (.npz, torch's .bin): an array's header, opcodes, bytes, the name; or a bomb."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # what was changed before
        return _bytes(content, draw)
    if not members:
        return content
    name = draw.choice(sorted(members))
    if any(key.endswith("data.pkl") for key in members) and draw.random() < 0.6:
        name = next(key for key in members if key.endswith("data.pkl"))
    kind, deflated = draw.random(), zipfile.ZIP_STORED
    if kind < 0.05:
        members[draw.choice(TEXTS).replace("\0", "0").replace("\ud800", "d") or "x"] = members.pop(name)
    elif kind < 0.1:
        del members[name]
    elif kind < 0.14:
        members[name], deflated = members[name][:200] + bytes(2**25), zipfile.ZIP_DEFLATED
    elif name.endswith(".npy"):
        members[name] = _array(members[name], draw)
    else:
        members[name] = (_opcodes if name.endswith(".pkl") else _bytes)(members[name], draw)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", deflated) as archive:
        for key, value in members.items():
            archive.writestr(zipfile.ZipInfo(key), value, deflated)
    return made.getvalue()


KINDS_OF_ARRAYS = ["<i8", "<i4", "|u1", "<f4", "<f8", "|b1", "|O", "<U4", "|S4", ">i8", "<M8[ns]", "<c8", "|V8", "zz"]
SHAPES = ["(4, 16)", "(64,)", "()", "(2, 2, 16)", "(0, 16)", "(-4, -16)", "(4294967296, 4294967296)", "(1,)",
          "(8589934592, 0)", "(4.0, 16)", "None", "(4, 17)"]  # fmt: skip


def _array(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a .npy array, a Python literal in text."""
    size = struct.unpack("<H", content[8:10])[0] if len(content) > 10 else 0
    descr = draw.choice(KINDS_OF_ARRAYS)
    shape = draw.choice(SHAPES)
    order = draw.choice(["True", "False", "None"])
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"
    if draw.random() < 0.2:
        return _bytes(content, draw)
    header = text.encode().ljust(118) + b"\n"
    return content[:8] + struct.pack("<H", len(header)) + header + content[10 + size :]


def _opcodes(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(OPCODES) + content[at + draw.choice([0, 0, 1, 4]) :]


def _text(content: bytes, draw: random.Random) -> bytes:
    """Put something odd into a text, or make it empty."""
    at = draw.randrange(len(content) + 1)
    odd = [
        b"\xff\xfe",
        b"\0",
        b"\r\n",
        b'"',
        b",",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"<s>" * 50,
        b"\n" * 2000,
        b"{{",
        b"{%",
    ]
    return content[:at] + draw.choice([*odd, draw.choice(TEXTS).encode("utf-8", "replace")]) + content[at:]


EDITORS: dict[str, tuple[Editor, ...]] = {
    ".json": (_json,),
    ".jsonl": (_lines, _lines, _text),
    ".safetensors": (_header, _header, _header_length),
    ".gguf": (_gguf_field,),
    ".npz": (_member,),
    ".bin": (_member, _opcodes),
    ".txt": (_text,),
    ".csv": (_text,),
    ".jinja": (_text,),
    ".md": (_text,),
}
