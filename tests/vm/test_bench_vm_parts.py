"""What of the bench beside virtio-balloon can be tested without a VM."""

import json
import socket
import threading
from collections.abc import Iterator

import bench_vm_report as report
import pytest
from bed_errors import BedError
from bed_monitor import JsonLines, Monitor
from bench_vm_peers import check_moved, mapped_bytes

MIB = report.MIB
TIMEOUT_S = 60.0
GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}'


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_the_monitor_passes_over_events_and_takes_lines_in_pieces(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, qemu = ends
    sent = (
        GREETING + b'\r\n{"return": {}}\r\n'
        b'{"event": "BALLOON_CHANGE", "data": {"actual": 1}}\r\n{"return": {"actual": 4096}}\r\n'
    )

    def play() -> None:
        for at in range(len(sent)):
            qemu.send(sent[at : at + 1])

    player = threading.Thread(target=play)
    player.start()
    monitor = Monitor(ours, TIMEOUT_S)
    assert monitor.version == "7.2.22"
    assert monitor.execute("query-balloon") == {"actual": 4096}
    player.join(TIMEOUT_S)
    asked = [json.loads(line) for line in qemu.recv(1 << 16).splitlines()]
    assert [question["execute"] for question in asked] == ["qmp_capabilities", "query-balloon"]


def test_what_the_monitor_refuses_is_said(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, qemu = ends
    qemu.sendall(
        GREETING + b'\r\n{"return": {}}\r\n'
        b'{"error": {"class": "DeviceNotActive", "desc": "No balloon device"}}\r\n'
    )
    monitor = Monitor(ours, TIMEOUT_S)
    with pytest.raises(BedError, match="balloon: No balloon device"):
        monitor.execute("balloon", value=1)


@pytest.mark.parametrize(
    ("sent", "said"),
    [(b"", "has ended"), (b"Traceback\n", "no JSON"), (b"[]\n", "no object")],
)
def test_a_vm_that_fails_is_named(
    ends: tuple[socket.socket, socket.socket], sent: bytes, said: str
) -> None:
    ours, vm = ends
    vm.sendall(sent)
    vm.shutdown(socket.SHUT_WR)
    with pytest.raises(BedError, match=f"the guest: .*{said}"):
        JsonLines(ours, "the guest").read(TIMEOUT_S)


def test_a_vm_that_says_nothing_is_given_up(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BedError, match="the guest: nothing within 0 s"):
        JsonLines(ends[0], "the guest").read(0.01)


SMAPS = """
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             393216 kB
Rss:              300000 kB
7f0020000000-7f0040000000 rwxp 00000000 00:00 0
Size:             524288 kB
Rss:               77777 kB
"""


def test_of_qemu_only_the_guests_memory_counts() -> None:
    assert mapped_bytes(SMAPS, 384 * MIB) == 300000 << 10
    with pytest.raises(BedError, match="0 mappings of 100 MiB in QEMU"):
        mapped_bytes(SMAPS, 100 * MIB)
    with pytest.raises(BedError, match="2 mappings of 384 MiB in QEMU"):
        mapped_bytes(SMAPS * 2, 384 * MIB)


@pytest.mark.parametrize("seen_mib", [0, 500, 940, 1100])
def test_memory_that_did_not_move_is_no_figure(seen_mib: int) -> None:
    with pytest.raises(BedError, match=f"the guest lost {seen_mib} MiB, and not 1024 MiB"):
        check_moved("the guest lost", seen_mib * MIB, 1024 * MIB)
    check_moved("the guest lost", 1020 * MIB, 1024 * MIB)
    if seen_mib == 940:
        check_moved("QEMU dropped", seen_mib * MIB, 1024 * MIB, 100 * MIB)


SETTING = report.Setting(
    qemu="7.2.22",
    kernel="6.1.0-cloud",
    accelerator="tcg",
    processors=2,
    guest_bytes=2304 * MIB,
    moved_bytes=1024 * MIB,
    turns=3,
)
ROUNDS = [
    report.Round(
        "4KiB",
        tuple(report.VirtioTurn(inflate_s, 0.5) for inflate_s in (9.0, 2.0, 1.0)),
        tuple(report.OurTurn(1.0, inflate_s, 0.01) for inflate_s in (4.0, 1.0, 4.0)),
    ),
    report.Round("2MiB", (report.VirtioTurn(2.0, 0.5),), (report.OurTurn(0.5, 1.0, 0.02),)),
]


def test_figures_are_medians_and_ratios_of_their_own_round() -> None:
    virtio, ours, plain, *second = report.rows(SETTING, ROUNDS)
    assert virtio == report.Row("4KiB", "virtio-balloon", 0.5, 2.0, 1.0, 1.0)
    assert ours == report.Row("4KiB", "memballoon", 0.25, 100.0, 0.5, 50.0)
    assert plain == report.Row("4KiB", "plain loop", 1.0, None, 2.0, None)
    assert [row.inflate_ratio for row in second] == [1.0, 2.0, 4.0]


def test_the_table_says_what_it_compares() -> None:
    text = report.table(SETTING, ROUNDS)
    lines = text.splitlines()
    assert "2304 MiB, 1024 MiB moved, medians of 3 turns" in lines[0]
    assert lines[5].split() == [
        *("4KiB", "memballoon", "0.25", "GiB/s", "0.50", "100", "GiB/s", "50.00")
    ]
    assert lines[6].split() == ["4KiB", "plain", "loop", "1", "GiB/s", "2.00"]
    assert "Not comparable" in text
    assert "Emulated (TCG)" in text
    assert max(map(len, lines)) <= report.WIDTH


def test_under_kvm_nothing_is_said_of_emulation() -> None:
    kvm = report.Setting(**{**report.to_json(SETTING, ROUNDS)["setting"], "accelerator": "kvm"})
    assert "Emulated" not in report.table(kvm, ROUNDS)


def test_the_json_has_every_turn() -> None:
    found = json.loads(json.dumps(report.to_json(SETTING, ROUNDS)))
    assert found["setting"]["moved_bytes"] == 1 << 30
    assert [turn["inflate_s"] for turn in found["rounds"][0]["virtio"]] == [9.0, 2.0, 1.0]
    assert found["figures"][1]["inflate_ratio"] == 0.5
    assert len(found["notes"]) == 5
