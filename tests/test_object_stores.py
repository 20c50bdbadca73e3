"""Stores and shards on an S3 server, and what becomes of them when it or the network has faults."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import s3_server
import safetensors.torch
import shard_files
import torch
from botocore.exceptions import ClientError, NoCredentialsError
from click.testing import CliRunner
from learners import numbered_examples, recipe
from processes import JOB, no_survivors, run_job, start_job, wait_until
from s3_server import CutAnswer, CutRequest, Delay, Refuse, Without, first, some
from s3fs.errors import translate_boto_error

from raymem import CurvatureRule, Store, Study, stream_curvature, verify
from raymem import retry as patience
from raymem.cli import main
from raymem.curvature.streaming import ScoringModel
from raymem.curvature.streaming.scoring_model import read_weights
from raymem.data.shards import Transform, list_shards
from raymem.data.shards.shard_readers import read_shard
from raymem.errors import ExamplesError, StoreError, StoreFullError, StoreHeldError
from raymem.fleet.blame import STORE_FAILURES_IN_A_ROW
from raymem.fleet.trial_queue import TrialQueue
from raymem.models import build_model
from raymem.store import DriverLock, Files, TrialKey
from raymem.store import files as files_module

INF = math.inf
KEY = TrialKey(INF, 3)
SCORES = ("examples", "folds", "influence")
MEGABYTE = 1 << 20
numbers = itertools.count()


@pytest.fixture(scope="module")
def s3():
    with s3_server.running() as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        yield server
        # Instances remember the endpoint.
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def url(s3):
    """A place of its own."""
    s3.forget()
    return f"s3://bucket/test-{next(numbers)}"


@pytest.fixture
def quick(monkeypatch):
    """Faults are met by `patiently` alone, at once, and not by botocore before it."""
    monkeypatch.setattr(patience, "TRIES_WITHIN", 1)
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.05)


# Objects


def test_create_is_if_absent_and_replace_is_not(url):
    files = Files(url)
    assert files.create("a/b.json", b"first")
    assert not files.create("a/b.json", b"second")
    assert files.read("a/b.json") == b"first"
    files.replace("a/b.json", b"third")
    assert files.read("a/b.json") == b"third"
    assert (files.read_end("a/b.json", 2), files.read_end("a/b.json", 99)) == (b"rd", b"third")
    files.replace("a/c.json", b"")
    assert files.read("a/c.json") == b""
    assert files.list() == ["a/b.json", "a/c.json"]
    assert files.list("nothing/here") == []
    assert files.exists("a/b.json")
    files.delete("a/b.json")
    files.delete("a/b.json")
    assert not files.exists("a/b.json")
    with pytest.raises(FileNotFoundError):
        files.read("a/b.json")
    assert files.url == url


FAULTS = {
    "throttled": Refuse(),
    "broken": Refuse("InternalError", 500),
    "bad gateway": Refuse("BadGateway", 502),
    "conflict": Refuse("ConditionalRequestConflict", 409),
    "connection dies in mid-request": CutRequest(3),
    "answer is lost": CutAnswer(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_by_itself_is_tried_again(s3, url, quick, fault):
    files = Files(url)
    files.create("before", b"")
    operations = {
        "create": (lambda: files.create("key", b"content"), True),
        "read": (lambda: files.read("key"), b"content"),
        "read_end": (lambda: files.read_end("key", 3), b"ent"),
        "replace": (lambda: files.replace("key", b"content!"), None),
        "exists": (lambda: files.exists("key"), True),
        "list": (lambda: files.list(), ["before", "key"]),
        "delete": (lambda: files.delete("key"), None),
    }
    for name, (operation, expected) in operations.items():
        s3.forget()
        with s3.faulty(first(3, FAULTS[fault])):
            assert operation() == expected, name
        assert len(s3.requests) > 3, name
    assert files.list() == ["before"]


def test_botocore_tries_within_too(s3, url):
    files = Files(url)
    with s3.faulty(first(4, Refuse())):
        files.replace("key", b"content")
    tried = [request for request in s3.seen("key") if request.what == "put"]
    assert len(tried) == 5
    assert files._fs.retries == 1


def test_an_answer_cut_in_its_middle_is_no_answer(s3, url, quick):
    files, data = Files(url), os.urandom(300_000)
    files.replace("key", data)
    with s3.faulty(first(3, CutAnswer(100_000), lambda request: request.what == "read")):
        assert files.read("key") == data
    for n in range(30):
        files.replace(f"many/{n:03d}", b"")
    with s3.faulty(first(3, CutAnswer(1000), lambda request: request.what == "list")):
        assert len(files.list("many")) == 30


def test_a_create_whose_answer_was_lost_is_ours_only_if_its_bytes_are(s3, url, quick):
    files = Files(url)
    with s3.faulty(first(1, CutAnswer(), lambda request: request.key.endswith("mine"))):
        assert files.create("mine", b"mine")
    assert files.create("theirs", b"theirs")
    with s3.faulty(first(2, CutAnswer(), lambda request: request.key.endswith("theirs"))):
        assert not files.create("theirs", b"mine")
    assert files.read("theirs") == b"theirs"


def in_parts(monkeypatch, files):
    """Large objects are those above 10 MB, in parts of 5 MB, the smallest there are."""
    pipe = functools.partial(files.fs.pipe_file, chunksize=5 * MEGABYTE)
    monkeypatch.setattr(files.fs, "pipe_file", pipe)


def test_a_put_that_dies_in_its_middle_is_no_object(s3, url, quick, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    files = Files(url)
    files.create("before", b"")
    for size in (10, MEGABYTE):
        dies = CutRequest(size // 2)
        with (
            s3.faulty(lambda request, dies=dies: dies if request.what == "put" else None),
            pytest.raises(StoreError, match="does not answer"),
        ):
            files.create("key", bytes(size))
        assert not files.exists("key")
        assert files.list() == ["before"]
    assert files.create("key", b"whole")


@pytest.mark.parametrize("step", ["begin", "part", "end"])
def test_an_upload_in_parts_that_dies_is_no_object(s3, url, quick, monkeypatch, step):
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    files = Files(url)
    in_parts(monkeypatch, files)
    data = os.urandom(12 * MEGABYTE)
    # The last part dies, or the request that makes an object of them.
    number = {"part": ["3"]}.get(step)

    def dies(request):
        ours = request.what == step and request.query.get("partNumber") == number
        return CutRequest(len(request.body) // 2) if ours else None

    for write in (files.create, files.replace):
        with s3.faulty(dies), pytest.raises(StoreError, match="does not answer"):
            write("large", data)
        assert not files.exists("large")
        assert files.list() == []
    monkeypatch.setattr(patience, "PATIENCE", 60.0)
    with s3.faulty(first(2, CutRequest(100), lambda request: request.what == step)):
        assert files.create("large", data)
    assert files.read("large") == data


def test_an_upload_in_parts_is_if_absent_too(s3, url, quick, monkeypatch):
    files = Files(url)
    in_parts(monkeypatch, files)
    data, other = os.urandom(11 * MEGABYTE), os.urandom(11 * MEGABYTE)
    # The object is made, and nobody is told.
    with s3.faulty(first(1, CutAnswer(), lambda request: request.what == "end")):
        assert files.create("large", data)
    assert [request.what for request in s3.seen("large")].count("part") == 6
    assert not files.create("large", other)
    assert files.read("large") == data
    gone = Refuse("NoSuchUpload", 404)  # what some servers say of an upload that was ended
    with s3.faulty(first(1, gone, lambda request: request.what == "end")):
        files.replace("large", other)
    assert files.read("large") == other


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Refuse("AccessDenied", 403), "no access to s3://bucket/.*check the credentials"),
        (Refuse("InvalidAccessKeyId", 403), "no access .*check the credentials"),
        (Refuse("SignatureDoesNotMatch", 403), "no access .*check the credentials"),
        (Refuse("ExpiredToken", 400), "no access .*check the credentials"),
        (Refuse("InvalidRequest", 400), "cannot be used .*check the URL, and the endpoint"),
    ],
)
def test_what_does_not_pass_is_said_at_once(s3, url, fault, message):
    files = Files(url)
    files.create("key", b"content")
    s3.forget()
    for operation in (
        lambda: files.create("new", b""),
        lambda: files.replace("key", b""),
        lambda: files.list(),
        lambda: files.delete("key"),
    ):
        with s3.faulty(lambda request: fault), pytest.raises(StoreError, match=message):
            operation()
    assert len(s3.requests) == 4
    if fault.status == 403:  # HEAD has no body that would say more
        for operation in (files.read, files.exists):
            with s3.faulty(lambda request: fault), pytest.raises(StoreError, match=message):
                operation("key")


@pytest.mark.alone
def test_missing_buckets_and_credentials_are_named(s3, monkeypatch):
    files = Files("s3://no-such-bucket/store")
    assert files.list() == []
    assert not files.exists("key")
    for write in (files.create, files.replace):
        with pytest.raises(StoreError, match="there is no bucket for s3://no-such-bucket/store"):
            write("key", b"")
    with pytest.raises(StoreError, match="there is no study in s3://no-such-bucket/store"):
        Store("s3://no-such-bucket/store").study()

    def without():
        raise NoCredentialsError

    start = time.monotonic()
    with pytest.raises(StoreError, match=r"no access to .*check the credentials"):
        patience.patiently(without, "s3://bucket")
    assert time.monotonic() - start < 1


def test_a_full_store_is_named(s3, url):
    files = Files(url)
    files.create("key", b"")
    with (
        s3.faulty(lambda request: Refuse("XMinioStorageFull", 507)),
        pytest.raises(StoreFullError, match="free some") as caught,
    ):
        files.replace("key", b"content")
    assert caught.value.exit_code == 4


@pytest.mark.alone
def test_patience_ends_in_one_clear_error(s3, url, quick, monkeypatch):
    files = Files(url)
    files.create("key", b"content")
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    start = time.monotonic()
    with (
        s3.faulty(lambda request: Refuse()),
        pytest.raises(StoreError, match=r"for 0\.5 s now .*as asked") as caught,
    ):
        files.list()
    assert 0.3 < time.monotonic() - start < 5
    assert "run the same command again: what is committed is kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(s3.requests) > 5


def answer(code, status, operation="PutObject", **more):
    """What s3fs makes of a server's answer."""
    response = {
        "Error": {"Code": code, "Message": "", **more},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return translate_boto_error(ClientError(response, operation))


def test_which_errors_pass_by_themselves():
    import aiohttp
    import urllib3
    from botocore import exceptions as of_botocore
    from fsspec.exceptions import FSTimeoutError

    class HttpError(Exception):  # as gcsfs's
        def __init__(self, code):
            self.code = code

    passing = [
        answer("SlowDown", 503), answer("503", 503), answer("500", 500), answer("504", 504),
        answer("ServiceUnavailable", 503), answer("TooManyRequests", 429),
        answer("RequestTimeout", 400), answer("OperationAborted", 409),
        answer("NoSuchUpload", 404), ConnectionResetError(), TimeoutError(), FSTimeoutError(),
        aiohttp.ClientPayloadError(), aiohttp.ServerDisconnectedError(),
        urllib3.exceptions.IncompleteRead(3, 5),
        of_botocore.ReadTimeoutError(endpoint_url="x"),
        of_botocore.ConnectTimeoutError(endpoint_url="x"),
        of_botocore.EndpointConnectionError(endpoint_url="x"),
        of_botocore.ConnectionClosedError(endpoint_url="x"),
        of_botocore.ResponseStreamingError(error="x"), HttpError(503), HttpError("429"),
    ]  # fmt: skip
    for error in passing:
        assert patience.is_transient(error), repr(error)
    staying = [
        answer("NoSuchKey", 404), answer("NoSuchBucket", 404), answer("AccessDenied", 403),
        answer("InvalidRequest", 400), answer("PreconditionFailed", 412),
        answer("PreconditionFailed", 412, Condition="If-None-Match"),
        FileNotFoundError(), FileExistsError(), PermissionError(), NoCredentialsError(),
        HttpError(400), ValueError(), OSError(28, "no space"),
        StoreError("with a cause of its own"),
    ]  # fmt: skip
    for error in staying:
        assert not patience.is_transient(error), repr(error)


# Servers that do not know If-None-Match


def test_a_server_that_creates_over_what_is_there_is_refused(s3, url):
    with (
        s3.faulty(lambda request: Without("If-None-Match")),
        pytest.raises(StoreError, match=r"overwrites .*If-None-Match"),
    ):
        Files(url).create("driver.json", b"")
    everything = fsspec.filesystem("s3").find(url)
    assert everything == []


def test_the_proof_is_made_once_and_leaves_nothing(s3, url):
    for key in ("a", "b"):
        assert Files(url).create(key, b"")
    assert len([r for r in s3.seen(r"/\.probe-") if r.what == "put"]) == 2
    assert sorted(fsspec.filesystem("s3").find(url)) == [f"{url[5:]}/a", f"{url[5:]}/b"]
    assert url in files_module.PROVEN


def test_a_probe_left_by_a_killed_process_is_not_part_of_the_store(url):
    files = Files(url)
    files.replace(".probe-1", b"first")
    assert files.list() == []


def test_servers_that_do_not_say_which_condition_failed_are_understood(s3, url):
    refused = Refuse("PreconditionFailed", 412)
    files = Files(url)
    files.create("key", b"first")
    with s3.faulty(first(1, refused, lambda request: request.what == "put")):
        assert not files.create("key", b"second")


# Processes and threads


def test_what_others_write_is_seen_at_once(url):
    ours, theirs = Files(url), Files(url)
    assert not ours.exists("trials/a")
    assert ours.list("trials") == []
    program = f"import fsspec; fsspec.filesystem('s3').pipe_file('{url}/trials/a', b'1')"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert ours.exists("trials/a")
    assert ours.list("trials") == ["trials/a"]
    theirs.delete("trials/a")
    assert ours.list("trials") == []
    with pytest.raises(FileNotFoundError):
        ours.read("trials/a")


@pytest.mark.alone
def test_one_of_many_racing_threads_creates(url):
    files, start = Files(url), threading.Barrier(8)

    def race(n):
        start.wait()
        return files.create("key", str(n).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert sum(won) == 1
    assert files.read("key") == str(won.index(True)).encode()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: files.replace(f"many/{n}", bytes([n])), range(40)))
        read = list(pool.map(lambda n: files.read(f"many/{n}"), range(40)))
        listed = list(pool.map(lambda n: len(files.list("many")), range(8)))
    assert read == [bytes([n]) for n in range(40)]
    assert listed == [40] * 8


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_files_of_before_a_fork_work_after_it(url):
    files = Files(url)
    files.create("key", b"before")
    child = os.fork()
    if child == 0:  # no assertion here may reach pytest
        done = files.read("key") == b"before" and files.create("from-child", b"")
        os._exit(0 if done else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    start = time.monotonic()
    assert files.list() == ["from-child", "key"]
    # A connection that the child had closed would be waited for.
    assert time.monotonic() - start < 10


# The lock


def test_a_second_driver_is_refused(url, quick):
    with DriverLock(Files(url)):
        with pytest.raises(StoreHeldError, match=str(os.getpid())):
            DriverLock(Files(url)).__enter__()
        with pytest.raises(StoreHeldError):
            small_study(url).train(engine="serial")
    assert Files(url).list() == ["examples.parquet", "study.json", "target.json"]


def test_a_lock_whose_answer_was_lost_is_ours(s3, url, quick):
    lost = first(2, CutAnswer(), lambda r: r.what == "put" and r.key.endswith("driver.json"))
    with s3.faulty(lost), DriverLock(Files(url)) as lock:
        assert json.loads(Files(url).read("driver.json"))["token"] == lock._token
    assert Files(url).list() == []


@pytest.mark.alone
def test_beats_survive_a_store_in_trouble_and_a_lost_lock_is_noticed(s3, url, quick):
    files = Files(url)
    with DriverLock(files, interval=0.05) as lock:
        with s3.faulty(some(0.5, Refuse(), CutAnswer(), CutRequest(5), seed=3)):
            time.sleep(1)
        assert not lock.lost.is_set()
        before = json.loads(files.read("driver.json"))["counter"]
        wait_until(lambda: json.loads(files.read("driver.json"))["counter"] > before, 10)
        other = DriverLock(files)._record()

        def taken_over():
            files.replace("driver.json", other)  # a heartbeat under way may put its own over it
            return lock.lost.wait(0.5)

        wait_until(taken_over, 20)
    assert files.read("driver.json") == other


def test_a_driver_that_lost_its_lock_stops(url, quick, monkeypatch):
    study = small_study(url)
    study.open_store()
    monkeypatch.setattr(Store, "commit", lost_before(Store.commit, Files(url)))
    monkeypatch.setattr(DriverLock.__init__, "__kwdefaults__", {"interval": 0.05, "progress": dict})
    with pytest.raises(StoreHeldError, match="took"):
        study.train(engine="serial")
    assert 1 <= len(Store(url).done()) < 8


def lost_before(commit, files):
    @functools.wraps(commit)
    def committed(self, *arguments):
        files.replace("driver.json", DriverLock(files)._record())
        time.sleep(0.5)
        return commit(self, *arguments)

    return committed


# Studies


def small_study(store, trials=8, **changes):
    settings = {
        "examples": numbered_examples(),
        "recipe": recipe("mlp-16", learning_rate=0.1),
        "store": store,
        "trials": trials,
        "curvature": CurvatureRule(),
        "keep_models": 2,
        **changes,
    }
    return Study(**settings)


def score_bytes(store):
    return {name: Store(store).files.read(f"scores/{name}.parquet") for name in SCORES}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same study on a local disk."""
    store = tmp_path_factory.mktemp("local") / "store"
    study = small_study(store)
    study.train(engine="serial")
    study.score()
    return store


def raymem(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_study_on_s3_has_the_scores_of_one_on_a_disk(url, undisturbed):
    study = small_study(url)
    assert study.train(engine="serial").done == 8
    assert small_study(url).train(engine="serial").committed == 0
    study.score()
    assert score_bytes(url) == score_bytes(undisturbed)
    text = raymem("status", url)
    assert f"{url}: " in text
    assert "trials: 8 of 8 done" in text
    assert "driver: none" in text
    assert "cost so far" in text
    assert raymem("scores", url, "--csv", "--all") == raymem(
        "scores", undisturbed, "--csv", "--all"
    )
    assert "8 trials read back; 0 objects damaged, 0 foreign, 0 missing" in raymem("verify", url)
    model, local = (ScoringModel.of_store(Store(at), TrialKey(INF, 1)) for at in (url, undisturbed))
    assert model.digest == local.digest
    weights = read_weights(f"{url}/{TrialKey(INF, 1).weights_key}")
    assert weights.keys() == Store(undisturbed).weights(TrialKey(INF, 1)).keys()


def test_damage_on_s3_is_found_moved_away_and_trained_again(url, undisturbed):
    small_study(url).train(engine="serial")
    files, damaged = Store(url).files, bytearray(Store(url).files.read(KEY.object_key))
    damaged[len(damaged) // 2] ^= 1
    files.replace(KEY.object_key, bytes(damaged))
    files.replace("stray.txt", b"?")
    text = raymem("verify", url, code=1)
    assert f"damaged: {KEY.object_key}" in text
    assert "foreign: stray.txt" in text
    files.delete("stray.txt")
    assert "moved to damaged/" in raymem("verify", url, "--repair")
    assert KEY not in Store(url).done()
    study = small_study(url)
    assert study.train(engine="serial").committed == 1
    study.score()
    assert score_bytes(url) == score_bytes(undisturbed)
    assert files.read(f"damaged/{KEY.object_key}") == bytes(damaged)


def test_a_study_on_a_faulty_network_ends_with_the_same_scores(s3, url, quick, undisturbed):
    faults = (Refuse(), Refuse("InternalError", 500), CutRequest(1000), CutAnswer(), CutAnswer(200),
              Delay(0.05))  # fmt: skip
    with s3.faulty(some(0.3, *faults, seed=11)):
        study = small_study(url)
        assert study.train(engine="serial").done == 8
        study.score()
        text = raymem("verify", url)
    assert "8 trials read back; 0 objects damaged, 0 foreign, 0 missing" in text
    assert score_bytes(url) == score_bytes(undisturbed)
    assert Store(url).failures() == []
    assert not Store(url).files.exists("driver.json")


def test_a_store_that_stays_away_stops_the_study(s3, url, quick, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    study = small_study(url)
    study.open_store()
    with (
        s3.faulty(lambda r: Refuse() if r.what == "put" and "/trials/" in r.key else None),
        pytest.raises(StoreError, match=r"does not answer.*run the same command again"),
    ):
        study.train(engine="serial")
    assert Store(url).done() == set()
    assert small_study(url).train(engine="serial").done == 8


def test_one_worker_without_a_network_does_not_end_a_fleet():
    queue = TrialQueue([TrialKey(INF, t) for t in range(10)])
    for worker in ("good", "bad"):
        queue.register(worker, worker, 0)
    for _ in range(STORE_FAILURES_IN_A_ROW):
        queue.finish("bad", queue.lease("bad").key, "store", "no answer")
        queue.finish("good", queue.lease("good").key, "committed")
    assert queue.lease("bad") is None
    assert queue.progress().workers_retired == 1
    # Where the only worker left cannot reach the store, nobody can.
    for _ in range(STORE_FAILURES_IN_A_ROW):
        assert queue.progress().fatal is None
        queue.finish("good", queue.lease("good").key, "store", "no answer")
    assert (queue.progress().fatal, queue.progress().fatal_kind) == ("no answer", "store")


def test_thousands_of_trials_are_listed_in_pages(s3, url):
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    keys = {TrialKey(INF, t) for t in range(2500)}
    for key in keys:
        backend.put_object("bucket", f"{url.removeprefix('s3://bucket/')}/{key.object_key}", b"-")
    s3.forget()
    with s3.faulty(first(2, Refuse(), lambda r: "continuation-token" in r.query)):
        assert Store(url).done() == keys
    pages = [request for request in s3.requests if request.what == "list"]
    assert len(pages) == 3 + 2
    assert len(s3.requests) == len(pages)


def test_a_footer_is_read_by_its_range(s3, url):
    small_study(url, trials=1).train(engine="serial")
    s3.forget()
    about = Store(url).provenance(TrialKey(INF, 0))
    assert about["seeds"] == vars(small_study(url).plan.seeds(0))
    assert [(r.what, r.headers.get("Range")) for r in s3.requests] == [("read", "bytes=-32768")]


def test_a_footer_longer_than_expected_is_read_all_the_same(tmp_path, monkeypatch):
    small_study(tmp_path, trials=1).train(engine="serial")
    expected = Store(tmp_path).provenance(TrialKey(INF, 0))
    monkeypatch.setattr("raymem.store.trials.FOOTER", 64)
    assert Store(tmp_path).provenance(TrialKey(INF, 0)) == expected


@pytest.mark.parametrize("streamed", [0, 3])
def test_status_reads_a_sample_of_many_trials(tmp_path, monkeypatch, streamed):
    """Its operations do not grow with the trials."""
    study = small_study(tmp_path, trials=300, keep_models=0)
    first_trials = small_study(tmp_path, trials=1, keep_models=0)
    first_trials.train(engine="serial")
    store = study.open_store()
    store.target = type(store.target)(trials=300)
    data = store.files.read(TrialKey(INF, 0).object_key)
    for t in range(1, 300):
        store.files.create(TrialKey(INF, t).object_key, data)
    for model, shard in itertools.product(range(streamed), range(4)):
        store.files.create(f"curvature/net-{model}/{shard}.parquet", b"")
    calls: Counter[str] = Counter()

    def count(name):
        method = getattr(Files, name)

        def counted(self, *arguments):
            calls[name] += 1
            return method(self, *arguments)

        monkeypatch.setattr(Files, name, counted)

    for name in ("read", "read_end", "list", "exists"):
        count(name)
    text = raymem("status", tmp_path)
    assert "trials: 300 of 300 done" in text
    assert text.count("4 shards") == streamed
    assert calls["read_end"] == 50
    assert calls["list"] == 3  # curvature, trials, failed
    assert calls["read"] + calls["exists"] <= 6


# Shards


def net():
    torch.manual_seed(0)
    model = build_model("tiny-resnet", n_classes=10, image_shape=(16, 16, 3))
    return ScoringModel(
        name="net", net=model, transform=Transform(size=(16, 16), way="fit"), n_classes=10
    )


@pytest.fixture(scope="module")
def shards(s3, digits, tmp_path_factory):
    """The same 30 images as tars, as Parquet and in folders; here, and on the server."""
    root = tmp_path_factory.mktemp("shards")
    shard_files.write_all(root, shard_files.encoded(digits, 30), n_shards=2)
    for path in root.rglob("*.*"):
        if path.is_file():
            fsspec.filesystem("s3").pipe_file(
                f"bucket/shards/{path.relative_to(root)}", path.read_bytes()
            )
    return root


def stream(at, store, **more):
    return stream_curvature(list_shards(str(at)), net(), Store(store), engine="serial", **more)


@pytest.mark.parametrize("form", ["tar", "parquet", "folders"])
def test_shards_on_s3_give_the_scores_of_shards_on_a_disk(shards, url, tmp_path, form):
    summary = stream(f"s3://bucket/shards/{form}", url)
    assert (summary.scored, summary.bad) == (30, [])
    stream(shards / form, tmp_path)
    assert Store(url).curvature("net").equals(Store(tmp_path).curvature("net"))
    assert stream(f"s3://bucket/shards/{form}", url).scored == 0
    assert "curvature of net: " in raymem("status", url)


@pytest.mark.parametrize(
    "form", ["tar", *(pytest.param(f, marks=pytest.mark.slow) for f in ("parquet", "folders"))]
)
def test_a_faulty_network_is_no_damage_to_shards(s3, shards, url, tmp_path, quick, form):
    faults = (Refuse(), CutRequest(), CutAnswer(), CutAnswer(100))
    with s3.faulty(some(0.4, *faults, seed=5)):
        summary = stream(f"s3://bucket/shards/{form}", url)
    assert (summary.scored, summary.bad) == (30, [])
    stream(shards / form, tmp_path)
    assert Store(url).curvature("net").equals(Store(tmp_path).curvature("net"))


@pytest.mark.parametrize("form", ["tar", "parquet", "folders"])
def test_a_network_that_stays_away_is_no_end_of_a_shard(s3, shards, url, quick, monkeypatch, form):
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    found = list_shards(f"s3://bucket/shards/{form}")
    for fault in (Refuse(), CutAnswer(100)):
        with s3.faulty(lambda r, f=fault: f if r.what == "read" else None):
            with pytest.raises(StoreError, match="does not answer"):
                list(read_shard(found[0]))
            with pytest.raises(StoreError, match="does not answer"):
                stream(f"s3://bucket/shards/{form}", url, skip_bad=True)
    assert not Store(url).files.list("curvature/net/part-0.parquet")
    with s3.faulty(lambda request: Refuse()), pytest.raises(ExamplesError, match="does not answer"):
        list_shards(f"s3://bucket/shards/{form}")
    with (
        s3.faulty(lambda request: Refuse("AccessDenied", 403)),
        pytest.raises(ExamplesError, match="check the credentials"),
    ):
        list_shards(f"s3://bucket/shards/{form}")


def test_weights_are_read_from_s3_and_large_ones_in_parts(s3, url, quick, monkeypatch):
    weights = {"layer.weight": torch.arange(3_000_000, dtype=torch.float32)}
    files = Files(url)
    in_parts(monkeypatch, files)
    files.replace("large.safetensors", safetensors.torch.save(weights))
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    files.replace("large.pt", buffer.getvalue())
    assert [request.what for request in s3.seen("large")].count("part") == 6
    with s3.faulty(some(0.4, Refuse(), CutAnswer(100_000), seed=2)):
        for name in ("large.safetensors", "large.pt"):
            assert torch.equal(
                read_weights(f"{url}/{name}")["layer.weight"], weights["layer.weight"]
            )
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    with s3.faulty(lambda r: Refuse()), pytest.raises(StoreError, match="does not answer"):
        read_weights(f"{url}/large.pt")


# Jobs


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_driver_is_gone_on_from(url, tmp_path):
    """With kill -9 in mid-study; the scores are those of a run on a disk that nobody disturbed."""
    arguments = ("--engine", "serial", "--trials", "12")
    job = start_job(url, *arguments)
    with no_survivors(job):
        wait_until(lambda: len(Store(url).done()) >= 3)
        job.kill()
        job.wait()
    done = Store(url).done()
    assert 3 <= len(done) < 12
    assert "driver: died" in raymem("status", url)
    again = run_job(url, *arguments)
    assert again.returncode == 0, again.stderr
    assert f"{12 - len(done)} trials trained" in again.stdout
    assert run_job(tmp_path, *arguments).returncode == 0
    assert score_bytes(url) == score_bytes(tmp_path)
    assert verify(Store(url)) == []


@pytest.mark.alone
@pytest.mark.slow
def test_a_fleet_on_ray_works_on_s3_and_refuses_a_second_driver(s3, url, tmp_path, monkeypatch):
    """With a store in some trouble all the time, and kill -9 as soon as something is committed."""
    gate = tmp_path / "gate"
    gate.mkdir()
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(gate))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    gated = [sys.executable, str(JOB.with_name("gated.py")), "--trials", "16", "--store"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=400)
    job = subprocess.Popen([*gated, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with (
        no_survivors(job) as family,
        s3.faulty(some(0.05, Refuse(), CutAnswer(), CutRequest(10), seed=7)),
    ):
        wait_until(lambda: (gate / "log").exists())
        second = run([*gated, url, "--engine", "serial"])
        assert second.returncode == 3, second.stderr
        assert "is held by process" in second.stderr
        family.update(psutil.Process(job.pid).children(recursive=True))
        (gate / "open").touch()
        wait_until(lambda: Store(url).done())
        job.kill()
        job.wait()
        wait_until(lambda: "driver: died" in raymem("status", url))
        again = run([*gated, url])
    assert again.returncode == 0, again.stderr
    assert len(Store(url).done()) == 16
    assert run([*gated, str(tmp_path / "local"), "--engine", "serial"]).returncode == 0
    assert score_bytes(url) == score_bytes(tmp_path / "local")
    assert verify(Store(url)) == []


@pytest.mark.alone
@pytest.mark.slow
def test_the_demo_runs_with_a_url_as_its_store(url):
    demo = Path(__file__).parents[1] / "jobs" / "feldman_digits.py"
    command = [sys.executable, str(demo), "--store", url, "--trials", "10", "--engine", "serial"]
    command += ["--private-trials", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert f"raymem scores {url} --top 20" in ran.stdout
    assert "10 of 10 done" in raymem("status", url)
    assert Store(url).scores().num_rows == len(np.unique(Store(url).scores()["example_id"]))


@pytest.mark.slow
def test_ray_data_streams_from_s3_to_s3(shards, url, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    program = (
        f"import sys; sys.path.insert(0, {str(JOB.parents[1])!r})\n"
        "from test_object_stores import *\n"
        "found = list_shards('s3://bucket/shards/tar')\n"
        f"print(stream_curvature(found, net(), Store({url!r}), scorers=1).scored)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "30"
    stream(shards / "tar", tmp_path)
    ours, theirs = (Store(at).curvature("net") for at in (url, tmp_path))
    assert ours["example_id"].equals(theirs["example_id"])
    assert ours["curvature"].to_numpy() == pytest.approx(theirs["curvature"].to_numpy(), rel=1e-4)
