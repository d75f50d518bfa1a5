"""pulumi-random (4): passwords and random bytes, from the system's generator.

Everything here lives in the stack's state alone; any change of an input makes a new value.
"""

from __future__ import annotations

import base64
import secrets
import string
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

import bcrypt

from .base import Call, Created, Failure, Input, Output, Provider, ProviderError, Resource
from .values import UNKNOWN, Properties

SPECIAL: Final = "!@#$%&*()-_=+[]{}<>:?"
BCRYPT_COST: Final = 10
BCRYPT_BYTES: Final = 72
"""bcrypt sees no more of a password than this."""

_KEEPERS: Final = Input("map", replaces=True)

_STRING_INPUTS: Final[Mapping[str, Input]] = {
    "length": Input("integer", required=True, replaces=True),
    "keepers": _KEEPERS,
    "lower": Input("boolean", default=True, replaces=True),
    "upper": Input("boolean", default=True, replaces=True),
    "numeric": Input("boolean", default=True, replaces=True),
    "number": Input("boolean", default=True, replaces=True),
    "special": Input("boolean", default=True, replaces=True),
    "minLower": Input("integer", default=0, replaces=True),
    "minUpper": Input("integer", default=0, replaces=True),
    "minNumeric": Input("integer", default=0, replaces=True),
    "minSpecial": Input("integer", default=0, replaces=True),
    "overrideSpecial": Input("string", replaces=True),
}


def generate(inputs: Properties) -> str:
    """A random string that keeps to the rules of ``inputs`` (lengths in characters)."""
    numeric = inputs["numeric"] and inputs["number"]
    special = inputs.get("overrideSpecial") or SPECIAL
    classes = [
        (string.ascii_lowercase, inputs["lower"], inputs["minLower"]),
        (string.ascii_uppercase, inputs["upper"], inputs["minUpper"]),
        (string.digits, numeric, inputs["minNumeric"]),
        (special, inputs["special"], inputs["minSpecial"]),
    ]
    alphabet = "".join(characters for characters, wanted, _ in classes if wanted)
    if not alphabet:
        raise ProviderError("the character set specified is empty")
    result = [secrets.choice(characters) for characters, _, least in classes for _ in range(least)]
    result += [secrets.choice(alphabet) for _ in range(inputs["length"] - len(result))]
    secrets.SystemRandom().shuffle(result)
    return "".join(result)


class RandomString(Resource):
    """Random characters that are no secret."""

    token = "random:index/randomString:RandomString"
    inputs = _STRING_INPUTS
    outputs: ClassVar[Mapping[str, Output]] = {"result": Output()}

    def check(self, inputs: Properties) -> Iterator[Failure]:
        lengths = {
            key: inputs[key]
            for key in ("length", "minLower", "minUpper", "minNumeric", "minSpecial")
        }
        if UNKNOWN in lengths.values():
            return
        least = sum(value for key, value in lengths.items() if key != "length")
        if lengths["length"] < 1:
            yield Failure("length", f"length must be at least 1, got: {lengths['length']}")
        if lengths["length"] < least:
            yield Failure(
                "length",
                "length must be at least sum of min_upper + min_lower + min_numeric + min_special "
                f"({least}), got: {lengths['length']}",
            )

    def create(self, inputs: Properties, call: Call) -> Created:
        result = generate(inputs)
        return Created(result, {"result": result})


class RandomPassword(RandomString):
    """Random characters that are a secret, with a bcrypt hash that never changes."""

    token = "random:index/randomPassword:RandomPassword"
    outputs: ClassVar[Mapping[str, Output]] = {
        "result": Output(secret=True),
        "bcryptHash": Output(secret=True),
    }

    def create(self, inputs: Properties, call: Call) -> Created:
        result = generate(inputs)
        digest = bcrypt.hashpw(result.encode()[:BCRYPT_BYTES], bcrypt.gensalt(BCRYPT_COST, b"2a"))
        return Created("none", {"result": result, "bcryptHash": digest.decode()})


class RandomBytes(Resource):
    """Random bytes that are a secret."""

    token = "random:index/randomBytes:RandomBytes"
    inputs: ClassVar[Mapping[str, Input]] = {
        "length": Input("integer", required=True, replaces=True),
        "keepers": _KEEPERS,
    }
    outputs: ClassVar[Mapping[str, Output]] = {
        "base64": Output(secret=True),
        "hex": Output(secret=True),
    }

    def check(self, inputs: Properties) -> Iterator[Failure]:
        if inputs["length"] is not UNKNOWN and inputs["length"] < 1:
            yield Failure("length", f"length must be at least 1, got: {inputs['length']}")

    def create(self, inputs: Properties, call: Call) -> Created:
        octets = secrets.token_bytes(inputs["length"])
        # The real provider's id is the base64 text itself, in plain; ours gives nothing away.
        return Created("none", {"base64": base64.b64encode(octets).decode(), "hex": octets.hex()})


class RandomId(Resource):
    """Random bytes for names; no secret."""

    token = "random:index/randomId:RandomId"
    inputs: ClassVar[Mapping[str, Input]] = {
        "byteLength": Input("integer", required=True, replaces=True),
        "keepers": _KEEPERS,
        "prefix": Input("string", replaces=True),
    }
    outputs: ClassVar[Mapping[str, Output]] = {
        "b64Std": Output(),
        "b64Url": Output(),
        "dec": Output(),
        "hex": Output(),
    }

    def check(self, inputs: Properties) -> Iterator[Failure]:
        if inputs["byteLength"] is not UNKNOWN and inputs["byteLength"] < 1:
            yield Failure("byteLength", f"must be at least 1, got: {inputs['byteLength']}")

    def create(self, inputs: Properties, call: Call) -> Created:
        octets = secrets.token_bytes(inputs["byteLength"])
        prefix = inputs.get("prefix", "")
        url = base64.urlsafe_b64encode(octets).decode().rstrip("=")
        return Created(
            url,
            {
                "b64Std": prefix + base64.b64encode(octets).decode(),
                "b64Url": prefix + url,
                "dec": prefix + str(int.from_bytes(octets, "big")),
                "hex": prefix + octets.hex(),
            },
        )


class Random(Provider):
    """The package ``random``."""

    package = "random"

    def __init__(self) -> None:
        resources: list[Resource] = [RandomString(), RandomPassword(), RandomBytes(), RandomId()]
        super().__init__({resource.token: resource for resource in resources})
