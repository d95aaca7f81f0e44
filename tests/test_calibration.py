"""The cost model's constants: fitted to what was measured, kept for one machine, and never half read."""

from __future__ import annotations

import json
import warnings
from math import inf
from unittest.mock import Mock

import pytest

from hyperkernels import calibration
from hyperkernels.backends import plan_call
from hyperkernels.call import ORDERS, Call
from hyperkernels.chunking import Grid

pytest.importorskip("rich", reason="calibrating shows its progress with rich")
from hyperkernels.bench import calibrate, measure


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A file of its own, and the model as it was afterwards."""
    before = calibration.constants()
    monkeypatch.setenv("HYPERKERNELS_CALIBRATION", str(tmp_path / "calibration.json"))
    yield tmp_path / "calibration.json"
    calibration.apply(before)


def test_a_user_without_a_home_has_no_calibration(monkeypatch):
    monkeypatch.delenv("HYPERKERNELS_CALIBRATION")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(calibration.os.path, "expanduser", lambda path: path)  # what there is of "~" then
    before = calibration.constants()
    assert calibration.path() is None
    calibration.load()
    assert calibration.constants() == before


def save(path, constants, machine=None):
    machine = calibration.machine_key() if machine is None else machine
    path.write_text(json.dumps({"format": calibration.FORMAT, "machine": machine, "constants": constants}))


def test_the_fit_finds_the_constants_that_made_the_points():
    before = calibration.constants()
    true = {name: value * factor for (name, value), factor in zip(before.items(), (2.0, 0.5, 3.0, 1.5, 0.4, 2.5, 0.7))}
    points = []
    for n in range(1, 12):
        native = {"vectors_per_us": 3e4 * n, "call_us": float(n % 3 > 0), "few_call_us": float(n % 3 == 0)}
        torches = {"flops_per_s": 3e13 * n * n, "memory_bytes_per_s": 1e12 * n, "cache_bytes_per_s": 4e12 * (n % 4)}
        points.append(calibrate.Point("cpu", 0.0, native))
        points.append(calibrate.Point("torch", 0.0, torches | {"product_us": 2.0}))
    points = [p._replace(measured_us=calibrate.expected_us(p, true)) for p in points]
    found = calibrate.fitted(points, before)
    assert found == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_fitted_is_what_the_planner_expects(order, rows, backend):
    call = Call(Grid(250, 256, 8, 64), 16, 1, 1, rows)
    (step,) = plan_call(call, ("y",), order, backend)[1].steps
    features = calibrate._native_features if backend == "cpu" else calibrate._torch_features
    point = calibrate.Point(backend, 1.0, features(call, step))
    assert calibrate.expected_us(point, calibration.constants()) == pytest.approx(step.time_us)


def test_what_is_kept_is_applied_on_its_machine_alone(kept):
    other = {name: value * 2 for name, value in calibration.constants().items()}
    before = calibration.constants()
    save(kept, other, machine="another CPU")
    calibration.load()
    assert calibration.constants() == before
    save(kept, other)
    calibration.load()
    assert calibration.constants() == other


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1'])
def test_a_damaged_file_changes_nothing_and_is_pointed_out(text, kept):
    before = calibration.constants()
    kept.write_text(text)
    with pytest.warns(UserWarning, match="no calibration"):
        calibration.load()
    assert calibration.constants() == before
    assert "no calibration" in calibration.state()


def test_constants_that_are_no_positive_numbers_are_refused(kept):
    before = calibration.constants()
    for wrong in (before | {"call_us": -1.0}, {"call_us": 1.0}, before | {"more": 1.0}):
        save(kept, wrong)
        with pytest.warns(UserWarning, match="wanted positive numbers"):
            calibration.load()
    assert calibration.constants() == before


def test_off_is_off(monkeypatch):
    monkeypatch.setenv("HYPERKERNELS_CALIBRATION", "off")
    assert calibration.path() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration.load()
    with pytest.raises(ValueError, match="off"):
        calibrate.calibrate()


@pytest.fixture
def few(monkeypatch):
    """Calls enough to fit to, and few, on a machine that nothing disturbs."""
    monkeypatch.setattr(measure, "UNSTEADY", inf)
    monkeypatch.setattr(calibrate, "LAYERS", [(256, 256)])
    monkeypatch.setattr(calibrate, "ROWS", (1, 16))


def test_calibrate_measures_keeps_and_draws(kept, few, tmp_path, capsys):
    calibration.apply({name: 3 * value for name, value in calibration.constants().items()})  # which anything betters
    picture = kept.with_suffix(".png")
    assert calibrate.calibrate() == 0
    told = capsys.readouterr()
    assert picture.stat().st_size > 10_000
    assert "as it was" in told.out
    assert "measuring" not in told.out
    calibration.load()
    assert calibration.constants() == json.loads(kept.read_text())["constants"]
    assert calibration.state() == f"fitted, in {kept}"


def test_a_fit_that_is_no_better_is_not_kept(kept, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "fitted", lambda _points, before: {n: 1e6 * v for n, v in before.items()})
    assert calibrate.calibrate() == 1
    assert "nothing is kept" in capsys.readouterr().out
    assert not kept.exists()
    assert "not fitted to this machine" in calibration.state()


def test_what_was_fitted_is_kept_though_it_cannot_be_drawn(kept, few, tmp_path, monkeypatch):
    calibration.apply({name: 3 * value for name, value in calibration.constants().items()})
    monkeypatch.setattr(calibrate, "draw", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        calibrate.calibrate()
    assert kept.exists()


def test_calibrate_says_before_it_measures_that_it_cannot_keep(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYPERKERNELS_CALIBRATION", str(tmp_path / "file" / "calibration.json"))
    monkeypatch.setattr(calibrate, "measured", Mock(side_effect=AssertionError("it measures")))
    with pytest.raises(ValueError, match="cannot write there"):
        calibrate.calibrate()


def test_rounds_are_passes_over_all_calls_and_steady_where_they_agree(few, monkeypatch):
    timed = []
    monkeypatch.setattr(measure, "UNSTEADY", 1.5)
    monkeypatch.setattr(calibrate, "timed", lambda run: timed.append(run) or float(len(timed)))
    points = calibrate.measured()
    assert timed == timed[: len(points)] * calibrate.ROUNDS
    assert [point.measured_us for point in points] == pytest.approx([1e6 * n for n in range(1, len(points) + 1)])
    assert not any(point.steady for point in points)
    monkeypatch.setattr(calibrate, "timed", lambda _run: 1.0)
    assert all(point.steady for point in calibrate.measured())


@pytest.mark.parametrize(("busy", "code"), [(0.25, 0), (0.75, 1)])
def test_calls_that_something_disturbed_are_left_out(busy, code, kept, few, monkeypatch, capsys):
    true = {name: 2 * value for name, value in calibration.constants().items()}
    points = [p._replace(measured_us=calibrate.expected_us(p, true)) for p in calibrate.measured()]
    many = round(busy * len(points))
    disturbed = [p._replace(measured_us=10 * p.measured_us, steady=False) for p in points[:many]]
    monkeypatch.setattr(calibrate, "measured", lambda: disturbed + points[many:])
    assert calibrate.calibrate() == code
    told = capsys.readouterr().out
    assert f"{many} of {len(points)} calls are left out" in told
    assert ("1.00 times fitted" in told) is kept.exists() is (code == 0)
    assert ("set OMP_WAIT_POLICY=passive, and calibrate again" in told) is (code == 1)


def test_a_constant_at_a_bound_of_the_fit_is_named(kept, few, monkeypatch, capsys):
    before = calibration.constants()
    found = {name: value * (calibrate.BOUND if name == "call_us" else 2) for name, value in before.items()}
    monkeypatch.setattr(calibrate, "fitted", lambda *_: found)
    calibrate.calibrate()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "a bound of the fit" in line] == ["call_us"]


def test_a_stopped_calibration_keeps_nothing(kept, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calibrate, "measured", Mock(side_effect=KeyboardInterrupt))
    assert calibrate.calibrate() == 1
    assert "stopped: nothing is kept" in capsys.readouterr().err
    assert not kept.exists()


def test_a_calibration_is_for_as_many_threads_as_it_was_made_with(monkeypatch):
    before = calibration.machine_key()
    monkeypatch.setattr(calibration.torch, "get_num_threads", lambda: 99)
    assert calibration.machine_key() == before.rsplit(",", 1)[0] + ", 99 threads"
