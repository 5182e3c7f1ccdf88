"""Who may do what: the rules for each request, by its key, its path and where it comes from."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace

from hydraserve.errors import ForbiddenError, UnauthenticatedError
from hydraserve.server.keys import ANONYMOUS, KeyRing, Principal, Role


@dataclass(frozen=True)
class Caller:
    """What is known of who sent a request, besides its key.

    address: of the peer; "" for a Unix socket.
    host:    the Host header; origin: the Origin header.
    proxied: whether a proxy says that it passes the request on.
    """

    address: str = ""
    host: str = ""
    origin: str | None = None
    proxied: bool = False

    @property
    def is_local(self) -> bool:
        """Whether this is a program on this machine that means this server: no proxy's client, and no web page that a
        browser here happens to show (which would send its own Origin, or a Host name that points here)."""
        names = [self.host] if self.origin is None else [self.host, self.origin.partition("://")[2]]
        return not self.proxied and is_loopback(self.address) and all(is_loopback(_hostname(name)) for name in names)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own; "" stands for a Unix socket."""
    if host in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _hostname(authority: str) -> str:
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


@dataclass(frozen=True)
class Gate:
    """The rules: may this request go on, and as whose?

    local_admin: whether a program on this machine may administer without an admin key.
    """

    keys: KeyRing
    local_admin: bool = False

    def admit(self, method: str, path: str, authorization: str | None, caller: Caller) -> Principal:
        """The principal of an admitted request.

        Raises UnauthenticatedError or ForbiddenError. Requests are counted elsewhere, see `is_counted`.
        """
        if path in _PUBLIC or path.startswith(_PAGE) or method == "OPTIONS":
            return ANONYMOUS
        principal = self._identify(method, path, authorization)
        if is_administration(method, path):
            return self._admit_admin(principal, caller)
        if path.startswith("/metrics"):
            return self._admit_metrics(principal)
        if not is_inference(path):
            return self._admit_operator(principal, path)
        if principal is None:
            if self.keys.has_inference_keys:
                raise _no_key("a key of this server")
            principal = ANONYMOUS
        if principal.role is Role.METRICS:
            raise _forbidden(principal, "use a model")
        return self._with_local_rights(principal, caller)

    def _with_local_rights(self, principal: Principal, caller: Caller) -> Principal:
        """Where a local program may administer, it may also see what administrators see."""
        return replace(principal, role=Role.ADMIN) if self.local_admin and caller.is_local else principal

    def _identify(self, method: str, path: str, authorization: str | None) -> Principal | None:
        """Who it is. Where no key is asked for, a key that is not known does no harm: many clients always send one."""
        try:
            return self.keys.identify(authorization)
        except UnauthenticatedError:
            is_open = not self.keys.has_inference_keys and path.startswith(_INFERENCE)
            if not self.keys.has_keys or (is_open and not is_administration(method, path)):
                return None
            raise

    def _admit_admin(self, principal: Principal | None, caller: Caller) -> Principal:
        if principal is not None and principal.role is Role.ADMIN:
            return principal
        if self.local_admin and caller.is_local and (principal is not None or not self.keys.has_inference_keys):
            return self._with_local_rights(principal or ANONYMOUS, caller)
        if principal is not None:
            raise _forbidden(principal, "administer adapters")
        if self.keys.has_admin_key:
            raise _no_key("the admin key")
        raise ForbiddenError(
            what="administration of adapters",
            got="a server without an admin key",
            expected="an admin key, or a request from this machine to a server that listens on a loopback address",
            fix="start the server with HYDRASERVE_ADMIN_API_KEY set, or with --host 127.0.0.1",
        )

    def _admit_metrics(self, principal: Principal | None) -> Principal:
        if not self.keys.has_tenants:
            return principal or ANONYMOUS
        if principal is None:
            raise _no_key("a key of role metrics or admin: the metrics name every adapter")
        if principal.role is Role.INFERENCE:
            raise _forbidden(principal, "read the metrics, which name every adapter")
        return principal

    def _admit_operator(self, principal: Principal | None, path: str) -> Principal:
        """vLLM's other routes (sleep, pause ...): for administrators, if there are keys for them, or tenants."""
        if principal is None and (self.keys.has_admin_key or self.keys.has_inference_keys):
            raise _no_key("a key of this server")
        needs_admin = self.keys.has_admin_key or self.keys.has_tenants
        if principal is not None and principal.role is not Role.ADMIN and needs_admin:
            raise _forbidden(principal, f"use {path}")
        return principal or ANONYMOUS


_PUBLIC = frozenset({"/health", "/ready", "/ping", "/version", "/docs", "/redoc", "/openapi.json"})
_PAGE = "/inspector"  # only files; what they ask for carries the key that its user types in
_INFERENCE = (
    *("/v1/", "/v2/", "/inference/", "/cohere/", "/tokenize", "/detokenize", "/pooling", "/classify", "/score"),
    *("/rerank", "/embed", "/invocations", "/generative_scoring"),
)
_ADMINISTRATION = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def is_inference(path: str) -> bool:
    """Whether this is a route of the models' API."""
    return path.startswith(_INFERENCE)


def is_administration(method: str, path: str) -> bool:
    """Whether this changes which adapters are served."""
    if path in _ADMINISTRATION:
        return True
    return (path == "/v1/adapters" or path.startswith("/v1/adapters/")) and method not in ("GET", "HEAD")


def is_counted(method: str, path: str) -> bool:
    """Whether a key's limit of requests a minute counts this one."""
    return is_inference(path) and not is_administration(method, path) and method != "OPTIONS"


def _no_key(expected: str) -> UnauthenticatedError:
    return UnauthenticatedError(
        what="Authorization", got="no key", expected=expected, fix="send the header Authorization: Bearer KEY"
    )


def _forbidden(principal: Principal, action: str) -> ForbiddenError:
    return ForbiddenError(
        what=f"key {principal.name!r}", got=f"role {principal.role}", expected=f"a key that may {action}", fix="use one"
    )
