// Draws the charts that the page describes as JSON, in the colours of the screen's scheme, or of paper.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const drawn = [];
  const ink = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const trimmed = (number) => String(Number(number.toPrecision(4)));
  const scaled = (value, units) => {
    const [size, unit] = units.find(([each]) => Math.abs(value) >= each) || [1, ""];
    return value ? trimmed(value / size) + (unit && " " + unit) : "0";
  };
  const texts = {
    number: (value) => (value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2) : trimmed(value)),
    count: (value) => scaled(value, [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]),
    bytes: (value) => scaled(value, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]),
    seconds: (value) => scaled(value, [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]),
    percent: (value) => trimmed(100 * value) + " %",
  };

  function options() {
    const axis = (more) => ({
      border: { color: ink("line") },
      grid: { color: ink("line") },
      ticks: { color: ink("soft"), maxRotation: 0, autoSkipPadding: 14 },
      ...more,
    });
    return {
      animation: false,
      responsive: true,
      maintainAspectRatio: false,
      color: ink("ink"),
      scales: { x: axis(), y: axis() },
      plugins: {
        legend: { position: "bottom", align: "start", labels: { color: ink("ink"), boxWidth: 14, boxHeight: 8, padding: 10 } },
        tooltip: { callbacks: {} },
      },
    };
  }

  function lines(chart) {
    const text = texts[chart.unit];
    const made = options();
    made.interaction = { mode: "nearest", axis: "x", intersect: false };
    made.scales.x.type = "linear";
    made.scales.x.ticks.callback = texts.count;
    made.scales.y.type = chart.logarithmic ? "logarithmic" : "linear";
    made.scales.y.ticks.maxTicksLimit = 6;
    made.scales.y.ticks.callback = text;
    made.plugins.legend.display = chart.series.filter((each) => each.in_legend).length > 1;
    made.plugins.legend.labels.filter = (item, data) => data.datasets[item.datasetIndex].inLegend;
    made.plugins.legend.labels.generateLabels = (drawing) =>
      Chart.defaults.plugins.legend.labels.generateLabels(drawing).map((item) => ({ ...item, lineWidth: 0 }));
    made.plugins.tooltip.filter = (item) => item.dataset.inTooltip;
    made.plugins.tooltip.callbacks.title = (items) => (items.length ? "step " + items[0].parsed.x : "");
    made.plugins.tooltip.callbacks.label = (item) => item.dataset.label + " " + text(item.parsed.y);
    const datasets = chart.series.map((each) => {
      const dots = each.style === "dots";
      const colour = ink(each.colour === null ? "bad" : "colour-" + (each.colour % 8));
      return {
        label: each.label,
        data: each.points.map(([x, y]) => ({ x, y })),
        parsing: false,
        inLegend: each.in_legend,
        inTooltip: each.style !== "trend",
        showLine: !dots,
        borderColor: each.style === "faint" ? colour + "40" : colour,
        backgroundColor: colour,
        borderWidth: each.style === "faint" ? 1 : 1.8,
        borderDash: each.style === "dashed" ? [5, 3] : [],
        pointRadius: dots ? 4 : each.points.length < 30 ? 2 : 0,
        pointStyle: dots ? "triangle" : "circle",
        pointHitRadius: 6,
      };
    });
    return { type: "line", data: { datasets }, options: made };
  }

  function bars(chart) {
    const text = texts[chart.unit];
    const made = options();
    made.indexAxis = "y";
    made.scales.x.stacked = made.scales.y.stacked = true;
    made.scales.x.ticks.callback = text;
    made.scales.x.suggestedMax = chart.limit;
    made.scales.y.grid.display = false;
    made.scales.y.ticks.autoSkip = false;
    made.plugins.legend.display = chart.series.length > 1;
    made.plugins.tooltip.callbacks.label = (item) => item.dataset.label + " " + text(item.parsed.x);
    const datasets = chart.series.map((each) => ({
      label: each.label, data: each.values, backgroundColor: each.colour, barPercentage: 0.85, categoryPercentage: 1,
    }));
    return { type: "bar", data: { labels: chart.rows, datasets }, options: made, plugins: chart.limit ? [limit(chart.limit)] : [] };
  }

  const limit = (value) => ({
    id: "limit",
    afterDatasetsDraw({ ctx, chartArea, scales }) {
      const x = scales.x.getPixelForValue(value);
      ctx.save();
      ctx.strokeStyle = ink("ink");
      ctx.lineWidth = 2;
      ctx.setLineDash([4, 3]);
      ctx.beginPath();
      ctx.moveTo(x, chartArea.top);
      ctx.lineTo(x, chartArea.bottom);
      ctx.stroke();
      ctx.restore();
    },
  });

  function timeline(chart) {
    const made = options();
    made.indexAxis = "y";
    made.scales.x.min = 0;
    made.scales.x.max = chart.end_s;
    made.scales.x.ticks.callback = texts.seconds;
    made.scales.x.ticks.includeBounds = false;
    made.scales.y.grid.display = false;
    made.scales.y.ticks.autoSkip = false;
    made.plugins.legend.labels.filter = (item, data) => data.datasets[item.datasetIndex].inLegend;
    made.plugins.tooltip.callbacks.label = ({ raw }) =>
      raw.title + ", " + texts.seconds(raw.x[1] - raw.x[0]) + " from " + texts.seconds(raw.x[0]);
    const datasets = chart.series.map((each) => ({
      label: each.label,
      inLegend: each.in_legend,
      data: each.spans.map(([row, start, end, label, title]) => ({ x: [start, end], y: chart.rows[row], label, title })),
      backgroundColor: each.colour,
      ink: each.ink,
      grouped: false,
      barPercentage: 0.85,
      categoryPercentage: 1,
    }));
    return { type: "bar", data: { labels: chart.rows, datasets }, options: made, plugins: [numbers] };
  }

  // Numbers of micro-batches, where there is room for them.
  const numbers = {
    id: "numbers",
    afterDatasetsDraw(chart) {
      const { ctx } = chart;
      ctx.save();
      ctx.font = "11px system-ui, sans-serif";
      ctx.textAlign = "center";
      ctx.textBaseline = "middle";
      chart.data.datasets.forEach((dataset, index) => {
        ctx.fillStyle = dataset.ink;
        chart.getDatasetMeta(index).data.forEach((bar, place) => {
          const { x, base, y } = bar.getProps(["x", "base", "y"], true);
          const { label } = dataset.data[place];
          if (ctx.measureText(label).width + 2 <= Math.abs(x - base)) ctx.fillText(label, (x + base) / 2, y);
        });
      });
      ctx.restore();
    },
  };

  function draw() {
    drawn.splice(0).forEach((chart) => chart.destroy());
    Chart.defaults.font.family = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
    document.querySelectorAll("canvas[data-chart]").forEach((canvas) => {
      const chart = page[canvas.dataset.chart];
      drawn.push(new Chart(canvas, { lines, bars, timeline }[chart.kind](chart)));
    });
    root.dataset.drawn = drawn.length;
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    draw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    draw();
  });
})();
