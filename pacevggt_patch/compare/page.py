"""report.html: one file without a network, for people. What came out stands first, then a table, then pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import Tensor

from ..clips import Clip
from ..runtime.plotting import load_extra
from . import clouds, pictures
from .clouds import CAMERA_COLOURS, Cloud
from .differences import Difference
from .report import DID_NOT_FIT, agreement_cell, of_processes, run_range, significant, speedup, truth_cell
from .runs import Side

STILL = (460, 600)  # height and width of the still picture of a cloud
# Points of all clouds of a page that can be turned, each of some 10 bytes; and of a cloud at least.
MOST_POINTS, LEAST_POINTS = 200_000, 15_000
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 60px; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.25; margin: 4px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 44px 0 4px; padding-top: 18px; border-top: 1px solid #ddd; overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 6px 0; max-width: 900px; overflow-wrap: anywhere; }
header p { max-width: none; }
.quiet, figcaption { color: #5a5a5a; font-size: 13px; }
.wide { overflow-x: auto; }
.wide table, .wide img { min-width: 860px; }
table { border-collapse: collapse; width: 100%; margin: 14px 0 6px; font-size: 13.5px; }
th, td { padding: 6px 7px; text-align: right; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; background: #f6f6f6; }
th small, td small { display: block; font-weight: 400; color: #5a5a5a; }
th[scope=row], .name { text-align: left; min-width: 112px; overflow-wrap: anywhere; }
tbody td { font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; height: auto; display: block; background: #f2f2f2; }
.grid { display: grid; gap: 8px; }
.grid figcaption { padding: 2px 0 4px; }
.head { font-size: 13px; font-weight: 600; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.two img { border: 1px solid #e2e2e2; }
.scale { display: grid; grid-template-columns: auto 220px auto 1fr; gap: 8px; align-items: center;
  font-size: 13px; margin: 8px 0; }
.scale i { height: 12px; border-radius: 2px; }
.plot { height: 560px; outline: 1px solid #ddd; position: relative; overflow: hidden; }
.plot p { position: absolute; inset: 45% 0 auto; text-align: center; max-width: none; }
details > summary { cursor: pointer; font-weight: 600; margin: 16px 0 8px; }
pre { background: #f6f6f6; padding: 12px; overflow-wrap: anywhere; white-space: pre-wrap; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 10px 0; }
dl.facts dt { color: #5a5a5a; }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dl.words dt { font-weight: 600; }
dl.words dd { margin: 0 0 8px; max-width: 900px; }
@media (max-width: 600px) {
  .grid { gap: 4px; }
  .head { font-size: 10px; overflow-wrap: anywhere; }
  .scale { grid-template-columns: auto minmax(0, 220px) auto; margin-bottom: 14px; }
  .scale span:last-child { grid-column: 1 / -1; }
}
"""
SCRIPT = """
function draw(box) {
  const plot = box.querySelector(".plot");
  if (plot.dataset.drawn) return;
  plot.dataset.drawn = "yes";
  const figure = JSON.parse(box.querySelector("script").textContent);
  plot.textContent = "";
  Plotly.newPlot(plot, figure.data, figure.layout, {displaylogo: false, responsive: true, scrollZoom: true,
    modeBarButtonsToRemove: ["toImage", "orbitRotation", "tableRotation", "resetCameraLastSave3d"]})
    .catch(() => { plot.textContent = "This browser draws no WebGL: see the pictures above."; });
}
function clear(box) {
  const plot = box.querySelector(".plot");
  if (plot.dataset.drawn) { Plotly.purge(plot); delete plot.dataset.drawn; }
}
// A browser has but a few WebGL contexts: what is closed gives its own back.
document.querySelectorAll("details.cloud").forEach(box => {
  box.addEventListener("toggle", () => box.open ? draw(box) : clear(box));
  if (box.open) draw(box);
});
"""
WORDS = {
    "Seconds": "The median wall time of one full prediction, with the fastest and the slowest run. Stock and all "
    "settings run in turn, after one run of each that is not counted.",
    "GPU memory": "The most that PyTorch had allocated during a run, model and images included.",
    "Rotation from stock": "For every pair of frames, the angle between the relative rotation of stock and that of the "
    "accelerated model: the median over pairs, and the 90th percentile.",
    "Direction from stock": "The same for the direction of the relative translation. Pairs whose stock baseline is "
    "shorter than 1 % of the cloud's size have no direction that means anything; they are left out.",
    "Depth from stock": "The difference of each pixel in percent of stock's depth, after one scale for the clip: the "
    "median over all pixels, and the mean.",
    "Points from stock": "The median distance between corresponding points in percent of the cloud's size, after one "
    "similarity that aligns the accelerated cloud with stock's. The size is the median distance of stock's points from "
    "their median. Points are the half of all pixels of which stock is more confident.",
    "AUC@30, rotation error, AbsRel": "Errors against the clip's own cameras and depth, where it has them: the area "
    "under the accuracy curve of relative poses up to 30 degrees, the median error of relative rotation, and the mean "
    "relative error of depth. Below stands the change from stock.",
}  # fmt: skip


@dataclass
class Page:
    """A page that grows by a section for each clip and setting."""

    sections: list[str] = field(default_factory=list)
    clouds: int = 0

    def add(
        self, clip: Clip, entry: dict[str, Any], sides: list[Side], differences: dict[str, Difference], patch: int,
        settings: int,
    ) -> None:  # fmt: skip
        """Add the sections of one clip.

        Args:
            clip: on the CPU.
            entry: of the report, for this clip.
            sides: stock first.
            differences: of the sides that could be compared with stock, by name.
            patch: pixels a side of a patch.
            settings: sections of the whole page.
        """
        stock, *others = sides
        for side, setting in zip(others, entry["settings"], strict=True):
            if side.fits:
                found = differences.get(side.name)
                self.sections.append(self.section(clip, entry, setting, stock, side, found, patch, settings))
            else:
                self.sections.append(heading(entry, setting) + "<p>There is nothing to show.</p></section>")

    def section(
        self, clip: Clip, entry: dict[str, Any], setting: dict[str, Any], stock: Side, side: Side,
        found: Difference | None, patch: int, settings: int,
    ) -> str:  # fmt: skip
        """The section of one clip and setting."""
        both = {"stock": stock, "accelerated": side} if found is not None else {"accelerated": side}
        depths: dict[str, Tensor] = {}
        for name, one in both.items():
            assert one.prediction is not None
            depths[name] = one.prediction.depth
        shown = pictures.FRAMES_SHOWN if settings <= 2 else 3  # the page is to stay small
        rows, ranges = pictures.frame_rows(
            clip.images, side.kept, depths, found and found.depth, patch, shown
        )
        drawn = {}
        most = min(clouds.TURNED_POINTS, max(LEAST_POINTS, MOST_POINTS // (2 * settings)))
        for name, one in both.items():
            assert one.prediction is not None
            alignment = found.alignment if found is not None and name != "stock" else None
            drawn[name] = clouds.make_cloud(one.prediction, clip.images, alignment, clouds.STILL_POINTS)
        parts = [
            heading(entry, setting),
            facts(setting),
            frame_grid(rows, ranges, setting),
            self.cloud_part(drawn, most),
        ]
        if found is not None:
            parts.append(curve_part(found))
        return "\n".join([*parts, "</section>"])

    def cloud_part(self, drawn: dict[str, Cloud], most: int) -> str:
        """Both clouds, still and to be turned."""
        first = next(iter(drawn.values()))
        view, length = clouds.view_of(first, *STILL), clouds.camera_length(first)
        figures = []
        for name, cloud in drawn.items():
            few = clouds.of_frames(cloud, clouds.STILL_FRAMES)
            picture = pictures.as_jpeg(clouds.still(few, view, CAMERA_COLOURS[name], length), None)
            figures.append(
                f'<figure><img src="{picture}" alt="point cloud and cameras, {name}">'
                f"<figcaption>{name}: points of depth and cameras; pyramids are cameras</figcaption></figure>"
            )
        data = clouds.turned_figure(drawn, most).replace("<", "\\u003c")
        is_open = " open" if self.clouds == 0 else ""
        self.clouds += 1
        aligned = " Accelerated points are aligned with stock's." if len(drawn) > 1 else ""
        return (
            f'<h3>Points</h3><div class="two">{"".join(figures)}</div>'
            f'<details class="cloud"{is_open}><summary>The clouds to turn</summary>'
            f'<div class="plot"><p>drawing …</p></div><script type="application/json">{data}</script>'
            f'<p class="quiet">Drag to turn, scroll to come nearer. The buttons choose whose points are shown.'
            f" At most {most:,d} points of each.{aligned}</p></details>"
        )

    def html(self, report: dict[str, Any]) -> str:
        """The whole page."""
        title = headline(report)
        plotly = load_extra("plotly.offline", "the point clouds of the page").get_plotlyjs()
        return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';
 script-src 'unsafe-inline' 'unsafe-eval'; worker-src blob:">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<header><h1>{escape(title)}</h1>
<p class="quiet">{escape(subtitle(report))}</p></header>
<main>
{overview(report)}
{"".join(self.sections)}
<section><h2>How it was run</h2>
{how(report)}
</section>
<section><h2>What the numbers are</h2>
<dl class="words">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in words(report).items())}</dl>
</section>
</main>
<script>{plotly}</script>
<script>{SCRIPT}</script>
</body></html>
"""


def headline(report: dict[str, Any]) -> str:
    """The outcome of the first setting on the first clip."""
    done = [setting for clip in report["clips"] for setting in clip["settings"]]
    if not done:
        return "Nothing has run"
    return f"{done[0]['outcome'][0].upper()}{done[0]['outcome'][1:]}"


def subtitle(report: dict[str, Any]) -> str:
    """What ran, in a line."""
    clips = report["clips"]
    what = f"{report['backbone']}, stock and accelerated by pacevggt-patch {report['pacevggt_patch']}"
    if clips:
        clip, several = clips[0], sum(len(clip["settings"]) for clip in clips) - 1
        name = clip["settings"][0]["name"]
        what += f", on {clip['name']}: {clip['frames']} frames of {clip['width']}×{clip['height']}, {name}"
        if several:
            what += f"; {several} more below"
    where = f"{report['environment']['device']}{of_processes(report)}"
    return f"{what}. {where}, {report['precision_in_words']}."


def heading(entry: dict[str, Any], setting: dict[str, Any]) -> str:
    """The beginning of a section: what it is of, and what came out."""
    return (
        f"<section><h2>{escape(entry['name'])}, {escape(setting['name'])}</h2>"
        f"<p><strong>{escape(setting['outcome'][0].upper() + setting['outcome'][1:])}.</strong></p>"
    )


def facts(setting: dict[str, Any]) -> str:
    """What ran."""
    listed = {
        "kept": f"{setting['kept_tokens']} of {setting['patches']} patch tokens of a frame",
        "weights": setting["weights"] or "",
        "full-attention heads": f"{setting['full_heads']} of {setting['heads']}"
        if setting["mode"] == "global"
        else "",
    }
    found = setting["agreement"]
    if found is not None and found["pairs"]:
        listed["pairs of frames"] = (
            f"{found['pairs']}; {found['pairs_without_direction']} of them too close together for a direction"
        )
    return fact_list(listed)


def fact_list(listed: dict[str, Any]) -> str:
    """Names and values; empty ones are left out."""
    rows = (
        f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in listed.items() if v not in ("", None)
    )
    return f'<dl class="facts">{"".join(rows)}</dl>'


def overview(report: dict[str, Any]) -> str:
    """The table of all clips and settings."""
    clips = report["clips"]
    sides = [side for clip in clips for side in (clip["stock"], *clip["settings"])]
    memory = any(side["peak_gib"] for side in sides)
    known = {
        key: any(side["truth"][key] is not None for side in sides)
        for key in ("auc30", "rotation_deg", "absrel")
    }
    columns = [("seconds", "median, range"), ("speed\u2011up", "")]
    columns += [("memory", "peak GiB")] * memory
    columns += [
        ("rotation from stock", "degrees (90 %)"), ("direction from stock", "degrees (90 %)"),
        ("depth from stock", "median % (mean)"), ("points from stock", "% of size"),
    ]  # fmt: skip
    columns += [("AUC@30", "%, more is better")] * known["auc30"]
    columns += [("rotation error", "degrees")] * known["rotation_deg"]
    columns += [("AbsRel", "less is better")] * known["absrel"]
    head = "".join(f"<th scope=col>{name}<small>{unit}</small></th>" for name, unit in columns)
    body = []
    for clip in clips:
        stock = clip["stock"]
        for side in (stock, *clip["settings"]):
            name = "stock" if side is stock else side["name"]
            values = [DID_NOT_FIT] * len(columns)
            if side["fits"]:
                values = [
                    f"{significant(side['seconds'], 3)}<small>{run_range(side)}</small>",
                    speedup(side, stock),
                ]
                values += [f"{side['peak_gib']:.1f}" if side["peak_gib"] else ""] * memory
                values += [
                    agreement_cell(side, stock, key) for key in ("rotation", "direction", "depth", "points")
                ]
                values += [
                    two_lines(truth_cell(side, key, digits))
                    for key, digits in (("auc30", 1), ("rotation_deg", 2), ("absrel", 4)) if known[key]
                ]  # fmt: skip
            first = f'<th scope=row rowspan="{1 + len(clip["settings"])}">{escape(clip["name"])}'
            first += f"<small>{clip['frames']} frames</small></th>"
            body.append(
                f'<tr class="{"stock" if side is stock else "setting"}">{first if side is stock else ""}'
                f'<td class="name">{escape(name)}</td>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
            )
    return (
        '<div class="wide" tabindex=0><table>'
        '<thead><tr><th scope=col class="name">clip</th><th scope=col class="name">model</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def two_lines(cell: str) -> str:
    """A value, and what stands in brackets behind it below it."""
    value, _, change = cell.partition(" (")
    return f"{value}<small>{change.rstrip(')')}</small>" if change else value


def frame_grid(
    rows: list[dict[str, Any]], ranges: dict[str, tuple[float, float]], setting: dict[str, Any]
) -> str:
    """Frames, kept tokens and depths, one row a frame."""
    titles = list(rows[0]["pictures"])
    cells = [f'<div class="head">{escape(title)}</div>' for title in titles]
    for row in rows:
        for title, picture in row["pictures"].items():
            caption = f"frame {row['frame']}" if title == "frame" else ""
            cells.append(
                f'<figure><img src="{picture}" alt="{escape(title)}, frame {row["frame"]}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    low, high = ranges["depth"]
    scales = [
        scale(pictures.DEPTH_COLOURS, significant(low), significant(high), "depth, in the model's own unit")
    ]
    if "difference of depth" in titles:
        most = f"{ranges['difference'][1]:.0f} % or more"
        scales.append(
            scale(
                pictures.DIFFERENCE_COLOURS, "0 %", most, "difference of depth, after one scale for the clip"
            )
        )
    what = ""
    if "kept patch tokens" in titles:
        dark = (
            "take their change from them"
            if setting["mode"] == "global"
            else "are merged into them, or pruned"
        )
        what = f'<p class="quiet">Bright patch tokens are kept; dark ones {dark}.</p>'
    elif setting["kept_tokens"] < setting["patches"]:
        what = '<p class="quiet">Kept patch tokens are not shown: inside the model the frames have another order.</p>'
    return (
        f"<h3>Frames, kept tokens and depth</h3>{what}"
        f'<div class="grid" style="grid-template-columns:repeat({len(titles)},minmax(0,1fr))">{"".join(cells)}</div>'
        f"{''.join(scales)}"
    )


def scale(colours: str, low: str, high: str, what: str) -> str:
    """What colours mean."""
    return (
        f'<div class="scale"><span>{escape(low)}</span><i style="background:{pictures.gradient(colours)}"></i>'
        f"<span>{escape(high)}</span><span>{escape(what)}</span></div>"
    )


def curve_part(found: Difference) -> str:
    """How far each frame is from stock."""
    each = found.values["per_frame"]
    shares: list[float | None] = each["depth"] or []
    percent = [None if share is None else 100 * share for share in shares]
    panels: dict[str, list[float | None]] = {
        "rotation from stock, degrees": each["rotation_deg"],
        "direction from stock, degrees": each["direction_deg"],
        "depth from stock, %": percent,
        "points from stock, % of size": each["points_percent"] or [],
    }
    panels = {name: values for name, values in panels.items() if any(value is not None for value in values)}
    if not panels:
        return ""
    return (
        f'<h3>Frame by frame</h3><figure><div class="wide" tabindex=0><img src="{pictures.curves(panels)}" '
        f'alt="{escape("; ".join(panels))}, by frame"></div><figcaption>'
        "Medians: of rotation and direction over the pairs that a frame is in, of depth and points over its pixels."
        "</figcaption></figure>"
    )


def how(report: dict[str, Any]) -> str:
    """Settings, environment and the command."""
    environment = {key.replace("_", "-"): value for key, value in report["environment"].items()}
    listed = {
        "backbone": report["backbone"],
        "clips": ", ".join(clip["path"] or "the bundled clip" for clip in report["clips"]),
        "precision": report["precision_in_words"],
        "compiled": "the accelerated model" if report["compile"] else "no",
        "timed runs": f"{report['repeats']} of each",
        **environment,
    }
    command = report["command"]
    again = f"<p>This makes it again:</p><pre>{escape(command)}</pre>" if command else ""
    return fact_list(listed) + again


def words(report: dict[str, Any]) -> dict[str, str]:
    """What the numbers are, but for those that are not on the page."""
    sides = [side for clip in report["clips"] for side in (clip["stock"], *clip["settings"])]
    left = set() if any(side["peak_gib"] for side in sides) else {"GPU memory"}
    if not any(value is not None for side in sides for value in side["truth"].values()):
        left.add("AUC@30, rotation error, AbsRel")
    return {name: text for name, text in WORDS.items() if name not in left}


def as_bytes(page: str) -> bytes:
    """A page as it is written; what is no character, as in the name of a file, becomes a question mark."""
    return page.encode("utf-8", "replace")
