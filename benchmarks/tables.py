"""What latency.py measured, in print."""

from __future__ import annotations

from typing import Any


def cell(value: float | None, form: str, width: int) -> str:
    """A number in its column, or a dash."""
    return ("-" if value is None else format(value, form)).rjust(width)


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['backbone']}, {report['size']}, {report['precision']}, {report['repeats']} repeats")
    if "attention" in report:  # not in reports of older code
        print(
            f"attention {report['attention']}, compiled {'yes' if report['compile'] else 'no'}, "
            f"{report.get('mode', '')} pruning, full-attention heads {report.get('full_heads', 0)}, heads in "
            f"{report['head_dtype'] or 'the dtype of the call'}, first call {report['first_call_seconds']:.1f} s"
        )
    print(
        f"{'frames':>7s} {'variant':12s}{'keep':>6s}{'merge':>7s}{'median s':>11s}{'min-max s':>18s}{'GiB':>7s}"
        f"{'speed-up':>10s}{'TFLOP/s':>9s}{'of floor':>10s}"
    )
    for row in report["rows"]:
        start = f"{row['frames']:>7d} {row['variant']:12s}"
        if row.get("seconds_median") is None:
            print(f"{start}  {row.get('error', 'out of memory')}")
            continue
        share = row.get("floor_share")
        print(
            f"{start}{cell(row.get('keep_ratio'), 'g', 6)}{cell(row.get('merge_budget'), '.2g', 7)}"
            f"{row['seconds_median']:>11.3f}{row['seconds_min']:>9.3f}-{row['seconds_max']:<8.3f}"
            f"{cell(row['peak_gib'], '.1f', 7)}{cell(row['speedup'], '.2f', 9)}x"
            f"{cell(row.get('tflop_per_second'), '.3g', 9)}{cell(share and 100 * share, '.0f', 9)}%"
        )
    for detail in report["details"]:
        print(f"\n{detail['variant']}, {detail['frames']} frames, keep ratio {detail['keep_ratio']:g}")
        print(
            f"  {'stage':16s}{'s':>9s}{'TFLOP':>10s}{'GB':>9s}{'TFLOP/s':>9s}{'floor s':>9s}{'of floor':>10s}"
        )
        for stage in detail["stages"]:
            share = stage.get("floor_share")
            print(
                f"  {stage['stage'].replace('_', ' '):16s}{stage['seconds']:>9.4f}{cell(stage.get('tflop'), '.3g', 10)}"
                f"{cell(stage.get('gbyte'), '.3g', 9)}{cell(stage.get('tflop_per_second'), '.3g', 9)}"
                f"{cell(stage.get('floor_seconds'), '.3g', 9)}{cell(share and 100 * share, '.0f', 9)}%"
            )
        if detail["host_syncs"] is not None:
            print(f"  host syncs: {detail['host_syncs']}")
        for kernel in detail["kernels"] or []:
            print(f"  {100 * kernel['share']:>5.1f} % {kernel['calls']:>7d} calls  {kernel['kernel']}")
    print()
    for skipped in report["skipped"]:
        print(f"{skipped['frames']} frames: skipped, {skipped['reason']}")
    if report["largest_frames"] is None:
        print("largest number of frames for usual cards: not measured on the CPU")
    for line in report["largest_frames"] or []:
        how = "measured" if line["measured"] else "extrapolated"
        variant = line["variant"] + (f" keep {line['keep_ratio']:g}" if line["keep_ratio"] else "")
        print(f"largest N in {line['card_gib']} GB, {variant}: {line['frames']} ({how})")
    for ratio, frames in report["break_even_frames"].items():
        print(
            f"break-even at keep {ratio} (smallest number of frames at which pace is faster): {frames or 'not found'}"
        )
    for row in report["budget"]:
        memory = row["predicted_gib"] and f", {row['predicted_gib']:.1f} and {row['measured_gib']:.1f} GiB"
        print(
            f"fit_budget, {row['frames']} frames, keep {row['keep_ratio']:g}: predicted "
            f"{row['predicted_seconds']:.3f} s, measured {row['measured_seconds']:.3f} s "
            f"({100 * row['error']:+.0f} %){memory or ''}; calibration {row['calibration_seconds']:.0f} s"
        )
