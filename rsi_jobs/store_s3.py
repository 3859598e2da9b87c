"""S3, or a server that speaks it, as the object store.

Credentials, region, endpoint, proxy and CA bundle come from where every AWS tool takes them
(AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_CA_BUNDLE, AWS_PROFILE, a service account's role, …).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rsi_jobs.errors import CannotCreate, NotFoundError, PassingFault, RsiError, StoreDenied
from rsi_jobs.store import RESERVED, Entry, check_key, check_prefix
from rsi_jobs.store_folder import translate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_MULTIPART_FROM = 64 << 20  # bytes; smaller files go up in one request
_PART = 16 << 20  # bytes a request of a larger one; S3 accepts 5 MiB to 5 GiB
_MAX_PARTS = 10_000
_THREADS = 4  # requests at once for one large file, so 64 MiB of memory
_PAGE = 1000  # keys a request to list or delete; S3's limit

_PASSING_CODES = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestTimeoutException",
    "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "ConditionalRequestConflict", "OperationAborted", "BadDigest",
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
}  # fmt: skip
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_FULL_CODES = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "InsufficientCapacity"}
_NESTED_CODES = {"ObjectParentIsFile", "ExistingObjectIsDirectory", "XMinioParentIsObject"}
_ABSENT_CODES = {"NoSuchKey", "NoSuchUpload", "NotFound", "404", ""}
_HINTS = {
    "AccessDenied": "these credentials lack the right to do that; grant it",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret does not fit the access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; log in again",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's; set it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "NotImplemented": "the server does not support this request; use one that `rsi doctor` passes",
}


class _UnmetError(Exception):
    """A condition (If-Match, If-None-Match) did not hold, or a range lies past the end."""


class S3Store:
    """One bucket and prefix. Passing faults are asked again with growing, random pauses."""

    def __init__(self, bucket: str, prefix: str, *, patience: float = 60.0) -> None:
        self.bucket = bucket
        self.prefix = prefix + "/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.patience = patience  # seconds for which one request is tried
        self.multipart_from = _MULTIPART_FROM
        self.page = _PAGE
        self._client = _client()
        # Someone whose server refuses checksums turns them off as for every AWS tool.
        wanted = getattr(self._client.meta.config, "request_checksum_calculation", None)
        self._checksums = wanted != "when_required"

    def get(self, key: str) -> bytes:
        """The whole object."""
        return self._read(key)[0]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end."""
        if start < 0 or length < 0:
            raise ValueError(f"a range starts at 0 or later, not at {start}, {length} bytes")
        if length == 0:
            self._head(key)
            return b""
        try:
            return self._read(key, Range=f"bytes={start}-{start + length - 1}")[0]
        except _UnmetError:
            return b""

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite."""
        self._put(key, data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Create, never overwrite."""
        while True:
            try:
                self._put(key, data, IfNoneMatch="*")
                return True
            except _UnmetError:
                # Perhaps by our own first request, whose answer was lost.
                with contextlib.suppress(NotFoundError):  # removed just now: try again
                    return self.get(key) == data

    def replace(self, key: str, data: bytes, etag: str | None) -> str | None:
        """Compare and swap."""
        try:
            if etag is None:
                return self._put(key, data, IfNoneMatch="*")
            return self._put(key, data, IfMatch=etag)
        except (_UnmetError, NotFoundError):
            try:
                found, new = self._read(key)
            except NotFoundError:
                return None
            return new if found == data else None

    def upload(self, key: str, path: Path) -> None:
        """Send a file, a large one in parts."""
        check_key(key)
        try:
            size = path.stat().st_size
            if size < self.multipart_from:
                self._put(key, path.read_bytes())
            else:
                self._upload_parts(key, path, size)
        except OSError as error:
            raise translate(path, error) from error

    def download(self, key: str, path: Path) -> None:
        """Fetch a file, a large one in ranges of one version."""
        size, etag = self._head(key)
        temporary = path.with_name(f"{RESERVED}tmp-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:

                def fetch(start: int) -> None:
                    end = min(start + _PART, size) - 1
                    data, _ = self._read(key, Range=f"bytes={start}-{end}", IfMatch=etag)
                    os.pwrite(file.fileno(), data, start)

                with ThreadPoolExecutor(_THREADS) as pool:
                    list(pool.map(fetch, range(0, size, _PART)))
            os.replace(temporary, path)
        except _UnmetError:
            raise PassingFault(f"{self.uri}/{key} changed while it was read; try again") from None
        except OSError as error:
            raise translate(path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose key starts with `prefix`, sorted by key."""
        full = self.prefix + check_prefix(prefix)
        more: dict[str, Any] = {}
        while True:
            page = self._ask("list_objects_v2", prefix, Prefix=full, MaxKeys=self.page, **more)
            for found in page.get("Contents", []):
                yield Entry(
                    found["Key"][len(self.prefix) :],
                    found["Size"],
                    found["ETag"],
                    found["LastModified"].timestamp(),
                )
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Iterable[str]) -> int:
        """Remove, up to 1000 a request."""
        names = [self._full(key) for key in keys]
        for start in range(0, len(names), self.page):
            batch = names[start : start + self.page]
            objects = {"Objects": [{"Key": name} for name in batch], "Quiet": True}
            for failed in self._ask("delete_objects", batch[0], Delete=objects).get("Errors", []):
                if failed.get("Code") != "NoSuchKey":
                    raise self._refusal("delete_objects", failed["Key"], failed.get("Code", ""), 403)
        return len(names)

    def delete_if(self, key: str, etag: str) -> bool:
        """Remove one version."""
        # The condition is new in S3: a server that ignores it does less harm after a look.
        with contextlib.suppress(NotFoundError):
            if self._head(key)[1] != etag:
                return False
            try:
                self._ask("delete_object", key, Key=self._full(key), IfMatch=etag)
            except _UnmetError:
                return False
            except NotFoundError:  # it stood a moment ago: our first request, or the same wish
                pass
            return True
        return False

    def exists(self, key: str) -> bool:
        """Whether an object stands there."""
        with contextlib.suppress(NotFoundError):
            self._head(key)
            return True
        return False

    def sweep(self, older_than: float = 86400.0) -> int:
        """Abort the multipart uploads that killed writers left."""
        page = self._ask("list_multipart_uploads", "", Prefix=self.prefix)
        old = [
            upload
            for upload in page.get("Uploads", [])
            if time.time() - upload["Initiated"].timestamp() > older_than
        ]
        for upload in old:
            self._abort(upload["Key"], upload["UploadId"])
        return len(old)

    def _full(self, key: str) -> str:
        return check_key(self.prefix + check_key(key))

    def _head(self, key: str) -> tuple[int, str]:
        try:
            answer = self._ask("head_object", key, Key=self._full(key))
        except NotFoundError:
            # An answer to HEAD has no body, so it cannot say that it is the bucket, or the user,
            # that does not exist. The answer to GET does.
            with contextlib.suppress(_UnmetError):
                self._read(key, Range="bytes=0-0")
            raise
        return answer["ContentLength"], answer["ETag"]

    def _read(self, key: str, **more: Any) -> tuple[bytes, str]:
        def request() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **more)
            # closing(): as a context manager a body hands out the raw stream, whose faults are
            # not botocore's and which does not notice a body cut short.
            with contextlib.closing(answer["Body"]) as body:
                return body.read(), answer["ETag"]

        return self._patiently("get_object", key, request)

    def _put(self, key: str, data: bytes, **more: Any) -> str:
        name = self._full(key)
        answer = self._ask("put_object", key, Key=name, Body=data, **self._sum(data), **more)
        return str(answer["ETag"])

    def _sum(self, data: bytes) -> dict[str, str]:
        """The checksum that the server compares with what arrived."""
        if not self._checksums:
            return {}
        return {"ChecksumSHA256": base64.b64encode(hashlib.sha256(data).digest()).decode()}

    def _upload_parts(self, key: str, path: Path, size: int) -> None:
        name = self._full(key)
        algorithm = {"ChecksumAlgorithm": "SHA256"} if self._checksums else {}
        started = self._ask("create_multipart_upload", key, Key=name, **algorithm)
        target = {"Key": name, "UploadId": started["UploadId"]}
        length = max(_PART, -(-size // _MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * length)
                data = file.read(length)
            checksum = self._sum(data)
            part = {"PartNumber": number}
            answer = self._ask("upload_part", key, Body=data, **target, **part, **checksum)
            return {**part, "ETag": answer["ETag"], **checksum}

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                parts = list(pool.map(send, range(1, -(-size // length) + 1)))
            try:
                done = {"MultipartUpload": {"Parts": parts}}
                self._ask("complete_multipart_upload", key, **target, **done)
            except NotFoundError:
                # No such upload: our first request completed it and its answer was lost, or
                # someone aborted it.
                if self._head(key)[0] != size:
                    raise
        except BaseException:
            with contextlib.suppress(RsiError):
                self._abort(name, started["UploadId"])
            raise

    def _abort(self, name: str, upload: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._ask("abort_multipart_upload", name, Key=name, UploadId=upload)

    def _ask(self, operation: str, key: str, **arguments: Any) -> Any:
        call = getattr(self._client, operation)
        return self._patiently(operation, key, lambda: call(Bucket=self.bucket, **arguments))

    def _patiently(self, operation: str, key: str, request: Callable[[], T]) -> T:
        """The answer to a request, asked again while its fault is a passing one."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        started, pause = time.monotonic(), 0.05
        while True:
            try:
                return request()
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if code not in _PASSING_CODES and status not in _PASSING_STATUS:
                    raise self._refusal(operation, key, code, status) from error
                reason = code or str(status)
            except (BotoCoreError, ResponseParserError) as error:
                if not _is_passing(error):
                    raise StoreDenied(
                        f"{self.uri}: {operation} could not be sent: {error}; "
                        "check the AWS_* settings and credentials"
                    ) from error
                reason = type(error).__name__
            waited = time.monotonic() - started
            if waited + pause > self.patience:
                raise PassingFault(
                    f"{self.uri} at {self._endpoint()}: {operation} of {key!r} failed for "
                    f"{waited:.0f} s, last with {reason}; try again when the server answers"
                )
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 5.0)

    def _refusal(self, operation: str, key: str, code: str, status: int) -> Exception:
        """Our error for an answer that asking again would not change."""
        where = f"{self.uri} at {self._endpoint()}"
        if status in (412, 416):
            return _UnmetError()
        if code == "NoSuchBucket":
            return NotFoundError(f"{where}: there is no bucket {self.bucket!r}; create it")
        if code in _NESTED_CODES:
            return CannotCreate(f"{where}: {key!r}: one object's key cannot be the folder of another's")
        if status == 404 and code in _ABSENT_CODES:
            return NotFoundError(f"{where} has no object {key!r}")
        if code in _FULL_CODES or status == 507:
            return CannotCreate(f"{where}: {operation} of {key!r}: no space left on the server")
        hint = _HINTS.get(code, "check the credentials, the region and the endpoint")
        return StoreDenied(f"{where}: {operation} of {key!r} refused ({code or status}): {hint}")

    def _endpoint(self) -> str:
        parts = urlsplit(self._client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # no password in messages


def _client() -> S3Client:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        settings = get_session()
        profile = settings.get_scoped_config()
        config = Config(
            connect_timeout=5,
            read_timeout=30,
            tcp_keepalive=True,
            max_pool_connections=4 * _THREADS,
            retries={"total_max_attempts": 1},  # we ask again ourselves: a lost answer matters
        )
        endpoint = {"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} & os.environ.keys()
        if (endpoint or "endpoint_url" in profile) and "s3" not in profile:
            # bucket.server needs a DNS name for every bucket, which own servers rarely have.
            config = config.merge(Config(s3={"addressing_style": "path"}))
        return boto3.Session(botocore_session=settings).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise StoreDenied(f"S3 cannot be used: {error}; check the AWS_* settings") from error


def _is_passing(error: Exception) -> bool:
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    return isinstance(
        error,
        (
            ResponseParserError,
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            exceptions.FlexibleChecksumError,
            exceptions.CredentialRetrievalError,
            exceptions.MetadataRetrievalError,
        ),
    )
