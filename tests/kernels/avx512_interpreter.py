"""An interpreter of AVX-512 assembly text, as far as the product kernels use it: for machines that have no AVX-512.

It follows Intel's manual, one instruction after the other, on the memory of this process. Every access must lie in
memory that it was told of.
"""

import ctypes
import re
from collections.abc import Callable

import numpy as np

_NAMES = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")
_MASK = (1 << 64) - 1
_MEMORY = re.compile(r"(?P<offset>-?\w*)\((?P<base>%\w+)?(?:,(?P<index>%\w+)(?:,(?P<scale>\d))?)?\)")
_TABLE, _HERE = 1 << 40, 1 << 41  # where the global offset table and the code are said to lie
_STACK = 1 << 20


class UnknownInstructionError(Exception):
    """An instruction that no kernel had when this was written."""


class Interpreter:
    """Runs ``void kernel(table, first tile, stop tile, first row, stop row)``.

    Args:
        text: AT&T assembly.
    """

    def __init__(self, text: str) -> None:
        self.code: list[tuple[str, list[str]]] = []
        self.labels: dict[str, int] = {}
        self.constants: dict[str, int] = {}
        self.alive: list[object] = []
        self.regions: list[tuple[int, int]] = []
        self.stack = ctypes.create_string_buffer(_STACK)
        self.allow(ctypes.addressof(self.stack), _STACK)
        self._read(text)
        self.ran: set[str] = set()

    def allow(self, address: int, size: int) -> None:
        """Tell of memory that the kernel may read and write."""
        self.regions.append((address, address + size))

    def run(self, *arguments: int) -> None:
        self.r = dict.fromkeys(["r" + name for name in _NAMES] + [f"r{number}" for number in range(8, 16)], 0)
        self.z = [np.zeros(64, np.uint8) for _ in range(32)]
        self.k = [0] * 8
        for name, value in zip(("rdi", "rsi", "rdx", "rcx", "r8"), arguments, strict=True):
            self.r[name] = value
        self.r["rsp"] = ctypes.addressof(self.stack) + _STACK - 64
        self.flags = (False, False, False)  # zero, sign, overflow
        place = 0
        with np.errstate(all="ignore"):
            while True:
                name, operands = self.code[place]
                self.ran.add(name)
                if name == "retq":
                    return
                target = self._step(name, operands)
                place = place + 1 if target is None else target

    def _read(self, text: str) -> None:
        for line in text.splitlines():
            line = line.split("#")[0].strip()
            if line.endswith(":"):
                label = line[:-1]
                if label.startswith(".LCPI"):
                    self._constant(text, label)
                else:
                    self.labels[label] = len(self.code)
            elif line and not line.startswith("."):
                name, _, rest = line.partition("\t")
                self.code.append((name, [part.strip() for part in re.split(r",(?![^(]*\))", rest)] if rest else []))

    def _constant(self, text: str, label: str) -> None:
        sizes = {".long": 4, ".quad": 8, ".short": 2, ".byte": 1}
        content = b""
        for line in text[text.index(f"{label}:") :].splitlines()[1:]:
            kind, _, number = line.split("#")[0].strip().partition("\t")
            if kind not in sizes:
                break
            content += (int(number, 0) & ((1 << 8 * sizes[kind]) - 1)).to_bytes(sizes[kind], "little")
        memory = ctypes.create_string_buffer(content, len(content) + 64)
        self.constants[label] = ctypes.addressof(memory)
        self.allow(ctypes.addressof(memory), len(content))
        self.alive.append(memory)

    # operands

    def _address(self, text: str) -> int:
        found = _MEMORY.fullmatch(text)
        if found is None:
            raise UnknownInstructionError(text)
        base, index = (int(self._register(found[part])) if found[part] else 0 for part in ("base", "index"))
        return (int(found["offset"] or "0", 0) + base + index * int(found["scale"] or 1)) & _MASK

    def _register(self, name: str) -> int:
        if name == "%rip":
            return 0
        return self.r[_whole(name)]

    def _load(self, address: int, size: int) -> bytes:
        self._check(address, size)
        return ctypes.string_at(address, size)

    def _store(self, address: int, content: bytes) -> None:
        self._check(address, len(content))
        ctypes.memmove(address, content, len(content))

    def _check(self, address: int, size: int) -> None:
        if not any(begin <= address and address + size <= end for begin, end in self.regions):
            raise AssertionError(f"{size} bytes at {address:#x} are in no memory of the kernel")

    def _integer(self, text: str, size: int = 8) -> int:
        """Return an operand as a signed number."""
        if text.startswith("$"):
            return self._symbol(text[1:])
        if text.startswith("%"):
            return _signed(self.r[_whole(text)], size)
        return int.from_bytes(self._load(self._address(text), size), "little", signed=True)

    def _symbol(self, text: str) -> int:
        if text.startswith("_GLOBAL_OFFSET_TABLE_"):
            return _TABLE - _HERE
        if text.endswith("@GOTOFF"):
            return self.constants[text.removesuffix("@GOTOFF")] - _TABLE
        return int(text, 0)

    def _set(self, text: str, value: int) -> None:
        if text.startswith("%"):
            self.r[_whole(text)] = value & (_MASK if _size(text) == 8 else 0xFFFFFFFF)
        else:
            self._store(self._address(text), (value & _MASK).to_bytes(8, "little"))

    def _vector(self, text: str, size: int = 64) -> np.ndarray:
        if text.startswith("%"):
            return self.z[int(text[4:])][:size]
        found = re.fullmatch(r"(.*)\{1to(\d+)\}", text)
        if found is not None:
            count = int(found[2])
            return np.tile(np.frombuffer(self._load(self._address(found[1]), size // count), np.uint8), count)
        return np.frombuffer(self._load(self._address(text), size), np.uint8)

    def _set_vector(self, text: str, content: np.ndarray) -> None:
        register = np.zeros(64, np.uint8)
        found = content.view(np.uint8)
        register[: found.size] = found
        self.z[int(text[4:])] = register

    # instructions

    def _step(self, name: str, operands: list[str]) -> int | None:
        if name in _JUMPS:
            return self.labels[operands[0]] if _JUMPS[name](*self.flags) else None
        if name.startswith("v"):
            self._vector_step(name, operands)
        elif name in ("kunpckwd", "kunpckdq"):
            low, high, out = (int(operand[2:]) for operand in operands)
            width = 16 if name == "kunpckwd" else 32
            self.k[out] = (self.k[high] << width) | (self.k[low] & ((1 << width) - 1))
        elif not name.startswith("prefetch"):
            self._integer_step(name, operands)
        return None

    def _integer_step(self, name: str, operands: list[str]) -> None:
        match name:
            case "movq" | "movabsq" | "movl":
                self._set(operands[1], self._integer(operands[0], 4 if name == "movl" else 8))
            case "movslq":
                self._set(operands[1], self._integer(operands[0], 4))
            case "leaq":
                where = _HERE if "%rip" in operands[0] else self._address(operands[0])
                self._set(operands[1], where)
            case "pushq":
                self.r["rsp"] -= 8
                self._store(self.r["rsp"], self.r[_whole(operands[0])].to_bytes(8, "little"))
            case "popq":
                self._set(operands[0], int.from_bytes(self._load(self.r["rsp"], 8), "little"))
                self.r["rsp"] += 8
            case "cmpq" | "testq":
                first, second = (self._integer(operand) for operand in operands)
                self._note(second - first if name == "cmpq" else second & first)
            case "cmovlq" | "cmovgq" | "cmovsq" | "cmovnsq" | "cmovgeq" | "cmovleq" | "cmoveq" | "cmovneq":
                value = self._integer(operands[0])
                if _JUMPS["j" + name[4:-1]](*self.flags):
                    self._set(operands[1], value)
            case "imulq" if len(operands) == 1:
                product = _signed(self.r["rax"], 8) * self._integer(operands[0])
                self.r["rax"], self.r["rdx"] = product & _MASK, product >> 64 & _MASK
            case _ if name in _ARITHMETIC:
                values = [self._integer(operand, _size(operands[-1])) for operand in operands[:2]]
                self._set(operands[-1], self._note(_ARITHMETIC[name](*values)))
            case _:
                raise UnknownInstructionError(f"{name} {', '.join(operands)}")

    def _note(self, value: int) -> int:
        """Set the flags of a result and return it."""
        wrapped = _signed(value & _MASK, 8)
        self.flags = (wrapped == 0, wrapped < 0, wrapped != value)
        return wrapped

    def _vector_step(self, name: str, operands: list[str]) -> None:
        out, masking = (operands or [""])[-1], re.findall(r"\{(%k\d|z)\}", operands[-1] if operands else "")
        out = out.split(" {")[0]
        if name == "vzeroupper":
            return
        if name in ("vmovups", "vmovaps", "vmovdqu64", "vmovdqu32", "vmovdqu16", "vmovdqa64", "vmovdqa32"):
            self._move(
                operands[0],
                out,
                int(masking[0][2:]) if masking else None,
                lane_bytes=_LANES.get(name, 4),
                zeroing="z" in masking,
            )
        elif masking:
            if name in _COMPARES:
                raise UnknownInstructionError(f"{name} {', '.join(operands)}")
            before = self.z[int(out[4:])].copy()
            self._vector_step(name, [*operands[:-1], out])
            self._merge(out, before, int(masking[0][2:]), _LANES.get(name, _lane_bytes(name)), "z" in masking)
        elif name in _COMPARES:
            kind, compare = _COMPARES[name]
            second, first = (self._vector(operand).view(kind) for operand in operands[:2])
            bits = compare(first, second)
            self.k[int(out[2:])] = sum(1 << place for place in np.flatnonzero(bits).tolist())
        elif name in ("vbroadcastss", "vpbroadcastd", "vpbroadcastw"):
            size = 2 if name == "vpbroadcastw" else 4
            self._set_vector(out, np.tile(np.asarray(self._vector(operands[0], size)), _width(out) // size))
        elif name in ("vextractf64x4", "vextracti64x4"):
            self._set_vector(out, self._vector(operands[1]).reshape(2, 32)[int(operands[0][1:])].copy())
        elif name in ("vinsertf64x4", "vinserti64x4"):
            parts = self._vector(operands[2]).reshape(2, 32).copy()
            parts[int(operands[0][1:])] = self._vector(operands[1], 32)
            self._set_vector(out, parts.reshape(-1))
        elif name in ("vcvtph2psx", "vcvtps2phx"):
            to = np.dtype(np.float32 if name == "vcvtph2psx" else np.float16)
            source = np.dtype(np.float16 if name == "vcvtph2psx" else np.float32)
            count = _width(out) // to.itemsize
            self._set_vector(out, self._vector(operands[0], count * source.itemsize).view(source).astype(to))
        elif name in ("vshufi64x2", "vshuff64x2", "vshufi32x4", "vshuff32x4"):
            picks, (second, first) = int(operands[0][1:]), (self._vector(part).reshape(4, 16) for part in operands[1:3])
            places = [picks >> 2 * place & 3 for place in range(4)]
            self._set_vector(out, np.concatenate([first[places[:2]], second[places[2:]]]).reshape(-1))
        elif name in _PERMUTES:
            kind = _PERMUTES[name]
            last, middle, first = (self._vector(part, _width(out)).view(kind) for part in operands)
            table, index = (first, middle) if name.startswith("vpermt2") else (middle, first)
            both = np.concatenate([table, last])
            self._set_vector(out, both[index % both.size])
        elif name == "vpslld":
            self._set_vector(out, self._vector(operands[1]).view(np.uint32) << np.uint32(int(operands[0][1:])))
        else:
            self._set_vector(out, self._computed(name, operands, _width(out)))

    def _computed(self, name: str, operands: list[str], width: int) -> np.ndarray:
        fused = re.fullmatch(r"vfn?m(?:add|sub)(132|213|231)(ps|ph)", name)
        if fused is not None:
            kind = np.float32 if fused[2] == "ps" else np.float16
            three, two, one = (self._vector(operand, width).view(kind).astype(np.longdouble) for operand in operands)
            by = dict(zip("123", (one, two, three), strict=True))
            a, b, c = (by[place] for place in fused[1])
            product = -(a * b) if name.startswith("vfn") else a * b
            return (product + c if "add" in name else product - c).astype(kind)
        found = _VECTORS.get(name)
        if found is None:
            raise UnknownInstructionError(f"{name} {', '.join(operands)}")
        kind, compute = found
        second, first = (self._vector(operand, width).view(kind) for operand in operands[:2])
        return compute(first, second).astype(kind)

    def _merge(self, out: str, before: np.ndarray, mask: int, lane_bytes: int, zeroing: bool) -> None:
        """Undo in a register what a mask does not name."""
        register = self.z[int(out[4:])]
        for lane in range(_width(out) // lane_bytes):
            if not self.k[mask] >> lane & 1:
                part = slice(lane_bytes * lane, lane_bytes * (lane + 1))
                register[part] = 0 if zeroing else before[part]

    def _move(self, source: str, out: str, mask: int | None, *, lane_bytes: int, zeroing: bool) -> None:
        source = source.split(" {")[0]
        wide = out if out.startswith("%") else source
        width = _width(wide)
        if mask is None:
            if out.startswith("%"):
                self._set_vector(out, np.array(self._vector(source, width)))
            else:
                self._store(self._address(out), self._vector(source, width).tobytes())
            return
        register = np.zeros(64, np.uint8) if zeroing or not out.startswith("%") else self._vector(out).copy()
        for lane in range(width // lane_bytes):  # only what the mask names is touched
            if not self.k[mask] >> lane & 1:
                continue
            part = slice(lane_bytes * lane, lane_bytes * (lane + 1))
            if not out.startswith("%"):
                self._store(self._address(out) + part.start, self._vector(source)[part].tobytes())
            elif source.startswith("%"):
                register[part] = self._vector(source)[part]
            else:
                loaded = self._load(self._address(source) + part.start, lane_bytes)
                register[part] = np.frombuffer(loaded, np.uint8)
        if out.startswith("%"):
            self.z[int(out[4:])] = register


def _whole(name: str) -> str:
    """Return the 64-bit register that a register is part of."""
    name = name.lstrip("%")
    if re.fullmatch(r"r\d+d?", name):
        return name.rstrip("d")
    return "r" + name[-2:]


def _size(name: str) -> int:
    return 4 if re.fullmatch(r"%(e\w\w|r\d+d)", name) else 8


def _width(register: str) -> int:
    return {"x": 16, "y": 32, "z": 64}[register[1]]


def _lane_bytes(name: str) -> int:
    """Return the size of the lanes that an instruction's mask names."""
    suffixes = {"ph": 2, "w": 2, "ps": 4, "d": 4, "pd": 8, "q": 8}
    return next(size for suffix, size in suffixes.items() if name.endswith(suffix))


def _signed(value: int, size: int) -> int:
    value &= (1 << 8 * size) - 1
    return value - (1 << 8 * size) if value >> (8 * size - 1) else value


def _largest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(first > second, first, second)  # the second if one is NaN


def _smallest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(first < second, first, second)


_LANES = {"vmovdqu16": 2, "vmovdqu64": 8, "vmovdqa64": 8}  # bytes; four by default
_JUMPS: dict[str, Callable[[bool, bool, bool], bool]] = {
    "jmp": lambda zero, sign, over: True,
    "je": lambda zero, sign, over: zero,
    "jne": lambda zero, sign, over: not zero,
    "js": lambda zero, sign, over: sign,
    "jns": lambda zero, sign, over: not sign,
    "jl": lambda zero, sign, over: sign != over,
    "jge": lambda zero, sign, over: sign == over,
    "jle": lambda zero, sign, over: zero or sign != over,
    "jg": lambda zero, sign, over: not zero and sign == over,
}
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "addq": lambda a, b: b + a,
    "subq": lambda a, b: b - a,
    "imulq": lambda a, b: _signed(b * a, 8),
    "andq": lambda a, b: b & a,
    "orq": lambda a, b: b | a,
    "xorl": lambda a, b: (b ^ a) & 0xFFFFFFFF,
    "shlq": lambda a, b=None: _signed(b << a, 8) if b is not None else _signed(a << 1, 8),
    "sarq": lambda a, b=None: b >> a if b is not None else a >> 1,
    "shrq": lambda a, b=None: (b & _MASK) >> a if b is not None else (a & _MASK) >> 1,
    "incq": lambda a: a + 1,
    "decq": lambda a: a - 1,
    "negq": lambda a: -a,
    "notq": lambda a: ~a,
}
_VECTORS: dict[str, tuple[type, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    **{f"vadd{suffix}": (kind, np.add) for suffix, kind in (("ps", np.float32), ("ph", np.float16))},
    **{f"vsub{suffix}": (kind, np.subtract) for suffix, kind in (("ps", np.float32), ("ph", np.float16))},
    **{f"vmul{suffix}": (kind, np.multiply) for suffix, kind in (("ps", np.float32), ("ph", np.float16))},
    **{f"vmax{suffix}": (kind, _largest) for suffix, kind in (("ps", np.float32), ("ph", np.float16))},
    **{f"vmin{suffix}": (kind, _smallest) for suffix, kind in (("ps", np.float32), ("ph", np.float16))},
    "vdivps": (np.float32, np.divide),
    "vpmaxsw": (np.int16, np.maximum),
    "vpmaxsd": (np.int32, np.maximum),
    "vpaddd": (np.uint32, np.add),
    **dict.fromkeys(("vandps", "vpandq", "vpandd", "vpand"), (np.uint32, np.bitwise_and)),
    **dict.fromkeys(("vxorps", "vpxor", "vpxord", "vpxorq"), (np.uint32, np.bitwise_xor)),
}
_PERMUTES: dict[str, type] = {
    **dict.fromkeys(("vpermt2ps", "vpermi2ps", "vpermt2d", "vpermi2d"), np.uint32),
    **dict.fromkeys(("vpermt2w", "vpermi2w"), np.uint16),
    **dict.fromkeys(("vpermt2pd", "vpermi2pd", "vpermt2q", "vpermi2q"), np.uint64),
}
_COMPARES: dict[str, tuple[type, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "vpcmpnleud": (np.uint32, np.greater),
    "vpcmpltud": (np.uint32, np.less),
    "vcmpltps": (np.float32, np.less),
    "vcmpltph": (np.float16, np.less),
}
