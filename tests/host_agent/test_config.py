"""The configuration: defaults, refusals by name, and no rule that a file gets around."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.config import Config, default_pool, load_config, parse_config
from host_agent.errors import ConfigError
from host_agent.facade.port import MIN_ASSIGNED_BYTES
from protocol.units import GIB, MIB, PAGE_BYTES

HOST = '[host]\npool = "1200MiB"\n'


def parsed(text: str) -> Config:
    return parse_config(text, "balloon.toml")


def vm(*lines: str, name: str = "web1", memory: str = '"160MiB"') -> str:
    return "\n".join(["[[vm]]", f'name = "{name}"', f"memory = {memory}", *lines, ""])


def test_defaults() -> None:
    config = parsed(HOST + vm())
    assert config.host.pool_bytes == 1200 * MIB
    assert config.host.reserve_bytes == 60 * MIB
    assert config.host.policy == "shares"
    assert config.host.control_socket == Path("/run/memballoon/control.sock")
    assert config.host.state_dir == Path("/var/lib/memballoon")
    assert config.host.cgroup_root == "memballoon"
    assert config.host.on_exit == "stop"
    assert (config.host.dry_patience_s, config.host.interval_s) == (10.0, 0.25)
    (web1,) = config.vms
    assert web1.assigned_bytes == web1.startup_bytes == 160 * MIB
    assert web1.reservation_bytes == 40 * MIB
    assert (web1.shares, web1.command, web1.frame_order) == (1000, (), 0)


def test_everything_said() -> None:
    config = parsed(
        '[host]\npool = "1GiB"\nreserve = "10MiB"\npolicy = "even"\nrun_dir = "/r"\n'
        'state_dir = "/s"\ncgroup_root = "lab"\non_exit = "keep"\ndry_patience_s = 3\n'
        "interval_s = 0.5\n"
        + vm(
            'reservation = "0"',
            "shares = 7",
            'startup = "32MiB"',
            'maximum = "60MiB"',
            "buffer_percent = 12.5",
            'swap = "48MiB"',
            "balloon_may_swap = true",
            'command = ["sleep", "1"]',
            'frames = "2MiB"',
            memory="67108864",
        )
    )
    assert config.host.reserve_bytes == 10 * MIB
    assert config.host.run_dir == Path("/r")
    assert config.host.on_exit == "keep"
    assert config.vms[0].model_dump() == {
        "name": "web1",
        "assigned_bytes": 64 * MIB,
        "reservation_bytes": 0,
        "shares": 7,
        "startup_bytes": 32 * MIB,
        "maximum_bytes": 60 * MIB,
        "buffer_percent": 12.5,
        "swap_bytes": 48 * MIB,
        "balloon_may_swap": True,
        "frames": "2MiB",
        "command": ("sleep", "1"),
        "image": None,
        "network": None,
        "container": None,
        "backend": "process",
    }
    assert config.vms[0].frame_order == 9


def test_a_pool_that_is_not_named_is_what_the_caller_says() -> None:
    assert parse_config("", "x", default_pool_bytes=GIB).host.pool_bytes == GIB
    assert parse_config(HOST, "x", default_pool_bytes=GIB).host.pool_bytes == 1200 * MIB


REFUSALS = [
    ("", "[host]: 'pool' is missing"),
    ("pool", "not TOML: "),
    ("host = 3", "[host]: this must be a table"),
    ("[hosts]\n" + HOST, "unknown key 'hosts' (did you mean 'host'?)"),
    (HOST + "pol = 1", "[host]: unknown key 'pol' (did you mean 'pool'?)"),
    (HOST + "pool_bytes = 1", "[host]: unknown key 'pool_bytes'"),
    ('[host]\npool = "many"', "[host]: pool: 'many' is not a size"),
    ("[host]\npool = nan", "[host]: pool: nan is not a size"),
    ("[host]\npool = -5", "[host]: pool: '-5' is negative"),
    (
        "[host]\npool = 1200",
        "[host]: pool: '1200' is less than a page of 4KiB: did you mean 1200MiB?",
    ),
    ("[host]\npool = 8192", "[host]: pool: this must be 8MiB or more"),
    (HOST + 'reserve = "2GiB"', "[host]: the reserve of 2GiB leaves nothing of the pool"),
    (HOST + 'on_exit = "die"', "[host]: on_exit: input should be 'stop' or 'keep'"),
    (HOST + "interval_s = 0", "[host]: interval_s: "),
    (HOST + "interval_s = nan", "[host]: interval_s: "),
    (HOST + 'run_dir = "here"', "[host]: run_dir: 'here' is not an absolute path"),
    (HOST + 'cgroup_root = "a//b"', "[host]: cgroup_root: 'a//b' is not the path of a cgroup"),
    (HOST + 'cgroup_root = "a/"', "[host]: cgroup_root: 'a/' is not the path of a cgroup"),
    (HOST + 'cgroup_root = "../x"', "[host]: cgroup_root: '../x' is not the path of a cgroup"),
    (HOST + '[vm]\nname = "web1"', "vm: this must be a list"),
    ("vm = [3]\n" + HOST, "vm number 1: this must be a table"),
    (HOST + '[[vm]]\nmemory = "1GiB"', "vm number 1: 'name' is missing"),
    (HOST + '[[vm]]\nname = "web1"', "vm 'web1': 'memory' is missing"),
    (
        HOST + '[[vm]]\nname = "web1"\nmemroy = "1GiB"',
        "vm 'web1': unknown key 'memroy' (did you mean 'memory'?)",
    ),
    ("[host]\npool_bytes = 1073741824", "[host]: unknown key 'pool_bytes'"),
    (
        HOST + '[[vm]]\nname = "web1"\nassigned_bytes = 67108864',
        "vm 'web1': unknown key 'assigned_bytes'",
    ),
    (HOST + vm("assigned_bytes = 1"), "vm 'web1': unknown key 'assigned_bytes'"),
    (HOST + vm() + vm(), "vm 'web1' is there twice"),
    (
        HOST + vm('container = "db"') + vm('container = "db"', name="web2"),
        "vm 'web2': the container 'db' is that of vm 'web1'",
    ),
    (HOST + vm(name="Web_1"), "vm 'Web_1': name: 'Web_1' is not a name: lower-case"),
    (HOST + vm(name="-a"), "vm '-a': name: "),
    (HOST + vm(name="a" * 33), "is not a name"),
    (HOST + vm(name="a\\n"), "is not a name"),
    (HOST + vm(memory='"160Mbit"'), "vm 'web1': memory: '160Mbit' is not a size"),
    (HOST + vm(memory="160"), "memory: '160' is less than a page of 4KiB: did you mean 160MiB?"),
    (HOST + vm(memory="8192"), "vm 'web1': memory: this must be 8MiB or more"),
    (HOST + vm("reservation = 40"), "reservation: '40' is less than a page of 4KiB: did you"),
    (HOST + vm(memory="1.5"), "vm 'web1': memory: 1.5 is not a size"),
    (
        HOST + vm('reservation = "161MiB"'),
        "vm 'web1': the reservation of 161MiB is above the assigned 160MiB",
    ),
    (HOST + vm('startup = "161MiB"'), "vm 'web1': the startup quota of 161MiB is not between"),
    (HOST + vm('startup = "39MiB"'), "vm 'web1': the startup quota of 39MiB is not between"),
    (HOST + vm('maximum = "161MiB"'), "vm 'web1': the maximum of 161MiB is not between"),
    (HOST + vm('maximum = "39MiB"'), "vm 'web1': the maximum of 39MiB is not between"),
    (HOST + vm("buffer_percent = -1"), "vm 'web1': buffer_percent: "),
    (HOST + vm("buffer_percent = nan"), "vm 'web1': buffer_percent: "),
    (HOST + vm('swap = "-1MiB"'), "vm 'web1': swap: '-1MiB' is negative"),
    (HOST + vm("swap = 64"), "swap: '64' is less than a page of 4KiB: did you mean 64MiB?"),
    (HOST + vm('swap = "64TiB"'), "vm 'web1': swap: '64TiB' is more than 16TiB"),
    (
        HOST + vm('swap = "64GiB"'),
        "vm 'web1': a swap of 64GiB is more than 8 times the assigned 160MiB",
    ),
    (HOST + vm("swap_bytes = 67108864"), "vm 'web1': unknown key 'swap_bytes'"),
    (
        HOST + vm("balloon_may_swap = true"),
        "vm 'web1': its balloon may swap, but the VM has no swap: give it some",
    ),
    (HOST + vm('swap = "1MiB"', "balloon_may_swap = 1"), "vm 'web1': balloon_may_swap: "),
    (HOST + vm("shares = 0"), "vm 'web1': shares: "),
    (HOST + vm("shares = true"), "vm 'web1': shares: this must be a whole number"),
    (HOST + vm('shares = "1"'), "vm 'web1': shares: this must be a whole number"),
    (HOST + vm('command = "ls -l"'), "vm 'web1': command: this must be a list"),
    (HOST + vm('command = ["ls", 3]'), "vm 'web1': command.1: this must be a string"),
    (HOST + vm('command = ["a\\u0000b"]'), "vm 'web1': command.0: an argument holds a NUL"),
    (HOST + vm('frames = "1GiB"'), "vm 'web1': frames: "),
    (
        HOST + vm('reservation = "1141MiB"', memory='"2GiB"'),
        "the reservations (1141MiB) and the host reserve (60MiB) exceed the pool of 1200MiB",
    ),
]


@pytest.mark.parametrize(("text", "said"), REFUSALS, ids=[said for _, said in REFUSALS])
def test_refusals_name_the_place_and_the_key(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parsed(text)
    message = refusal.value.message
    assert message.startswith("balloon.toml: ")
    assert said in message
    assert len(message.splitlines()) == 1
    assert refusal.value.exit_code == 2


def test_reservations_that_just_fit() -> None:
    assert parsed(HOST + vm('reservation = "1140MiB"', memory='"2GiB"')).vms


def test_it_is_frozen() -> None:
    config = parsed(HOST + vm())
    with pytest.raises(ValueError, match="frozen"):
        config.vms[0].shares = 3  # type: ignore[misc]


@given(
    pool_bytes=st.integers(MIN_ASSIGNED_BYTES, 64 * GIB),
    reserve_bytes=st.none() | st.integers(0, 8 * GIB),
    vms=st.lists(
        st.tuples(
            st.integers(0, 8 * GIB),
            st.none() | st.integers(0, 8 * GIB),
            st.none() | st.integers(0, 8 * GIB),
        ),
        max_size=4,
    ),
)
def test_what_is_accepted_keeps_every_promise(
    pool_bytes: int,
    reserve_bytes: int | None,
    vms: list[tuple[int, int | None, int | None]],
) -> None:
    text = f"[host]\npool = {pool_bytes}\n"
    text += "" if reserve_bytes is None else f"reserve = {reserve_bytes}\n"
    for number, (memory, reservation, startup) in enumerate(vms):
        lines = [] if reservation is None else [f"reservation = {reservation}"]
        lines += [] if startup is None else [f"startup = {startup}"]
        text += vm(*lines, name=f"vm{number}", memory=str(memory))
    try:
        config = parsed(text)
    except ConfigError as refusal:
        assert len(refusal.message.splitlines()) == 1  # noqa: PT017
        return
    host = config.host
    sizes = [host.pool_bytes, host.reserve_bytes]
    for spec in config.vms:
        assert 0 <= spec.reservation_bytes <= spec.startup_bytes <= spec.assigned_bytes
        assert spec.assigned_bytes >= MIN_ASSIGNED_BYTES
        sizes += [spec.reservation_bytes, spec.startup_bytes, spec.assigned_bytes]
    promised_bytes = sum(spec.reservation_bytes for spec in config.vms) + host.reserve_bytes
    assert promised_bytes <= host.pool_bytes <= pool_bytes
    assert all(size % PAGE_BYTES == 0 for size in sizes)
    assert host.reserve_bytes < host.pool_bytes


@given(st.text(max_size=60))
def test_any_text_is_a_config_or_a_one_line_refusal(text: str) -> None:
    try:
        parse_config(text, "x", default_pool_bytes=GIB)
    except ConfigError as refusal:
        assert len(refusal.message.splitlines()) == 1  # noqa: PT017


def test_default_pool() -> None:
    assert default_pool("MemTotal: 9 kB\nMemAvailable:    4194305 kB\n") == 3 * GIB
    assert default_pool("MemTotal: 9 kB\n") is None


MEMINFO = "MemTotal: 4194304 kB\nMemFree: 9 kB\nMemAvailable: 2097152 kB\n"


@pytest.mark.parametrize(
    ("pool", "warned"), [("2048MiB", False), ("2049MiB", True), ("4096MiB", True)]
)
def test_a_pool_that_is_in_use_is_warned_of(
    pool: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "balloon.toml"
    path.write_text(f'[host]\npool = "{pool}"\n', encoding="utf-8")
    assert load_config(path, MEMINFO).host.pool_bytes
    assert ("only 2GiB are available now" in caplog.text) is warned


@pytest.mark.parametrize("pool", ["4097MiB", "1000GiB"])
def test_a_pool_that_the_machine_has_not_is_refused(pool: str, tmp_path: Path) -> None:
    path = tmp_path / "balloon.toml"
    path.write_text(f'[host]\npool = "{pool}"\n', encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"pool: .*GiB is more than this machine's memory of 4GiB"
    ):
        load_config(path, MEMINFO)


def test_no_machine_has_the_whole_of_what_can_be_counted(tmp_path: Path) -> None:
    path = tmp_path / "balloon.toml"
    path.write_text('[host]\npool = "16TiB"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="16TiB is more than this machine's memory"):
        load_config(path)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "balloon.toml"
    path.write_text(HOST, encoding="utf-8")
    assert load_config(path, MEMINFO).host.pool_bytes == 1200 * MIB
    assert load_config(None).host.pool_bytes % MIB == 0


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "binary")


def test_an_image_makes_a_vm_a_container() -> None:
    table = parsed(HOST + vm('image = "redis:7"')).vms[0]
    assert (table.image, table.backend, table.command) == ("redis:7", "docker", ())


def test_somebody_elses_container() -> None:
    table = parsed(HOST + vm('container = "db-1"')).vms[0]
    assert (table.container, table.backend, table.command) == ("db-1", "attached", ())


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (
            ('container = "db"', 'image = "redis:7"', 'backend = "docker"'),
            "the attached backend, and no other, has a container of another's",
        ),
        (
            ('container = "db"', 'image = "redis:7"'),
            "an image is for the docker backend, not for attached",
        ),
        (
            ('container = "db"', 'command = ["sh"]'),
            "whoever starts the container chooses its command",
        ),
        (
            ('backend = "attached"',),
            "the attached backend, and no other, has a container of another's",
        ),
        (('container = "-db"',), "container: '-db' is not a name: it is not one that a container"),
        (('network = "lab"',), "a network is for a container of an image; others have none"),
        (('image = "redis:7"', 'network = "a b"'), "network: 'a b' is not a name: "),
        (('container = "db"', 'network = "lab"'), "a network is for a container of an image"),
        (('backend = "docker"',), "the docker backend needs an image"),
        (
            ('backend = "process"', 'image = "redis:7"'),
            "an image is for the docker backend, not for process",
        ),
        (('image = "-rm"',), "image: "),
        (('backend = "podman"',), "backend: "),
    ],
)
def test_backends_and_images_that_do_not_fit(keys: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(HOST + vm(*keys))
    assert f"vm 'web1': {reason}" in refused.value.one_line()
