"use strict";
(function () {
  const data = JSON.parse(document.getElementById("rows").textContent);
  const table = document.getElementById("examples");
  const body = table.tBodies[0];
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  let sorted = data.columns.findIndex(function (c) { return c.key === "memorization"; });
  let down = true;

  // Counts have no decimals, all other numbers the same.
  const digits = data.columns.map(function (_, i) {
    return data.rows.every(function (row) {
      return typeof row[i] !== "number" || Number.isInteger(row[i]);
    }) ? 0 : 3;
  });

  function cell(value, column) {
    const td = document.createElement("td");
    if (typeof value === "number") {
      td.className = "number";
      td.textContent = value.toFixed(digits[column]);
    } else {
      td.textContent = value === null ? "" : value;
    }
    return td;
  }

  function compare(a, b) {
    const x = a[sorted], y = b[sorted];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y));
    return down ? -order : order;
  }

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = data.rows.filter(function (row) {
      const text = row.join(" ").toLowerCase();
      return words.every(function (word) { return text.includes(word); });
    }).sort(compare);
    const shown = rows.slice(0, 200);
    const fragment = document.createDocumentFragment();
    shown.forEach(function (row) {
      const tr = document.createElement("tr");
      row.forEach(function (value, i) { tr.appendChild(cell(value, i)); });
      fragment.appendChild(tr);
    });
    body.replaceChildren(fragment);
    count.textContent = shown.length < rows.length
      ? "First " + shown.length + " of " + rows.length.toLocaleString("en") + " rows"
      : rows.length.toLocaleString("en") + " rows";
    table.querySelectorAll("th").forEach(function (th, i) {
      th.setAttribute("aria-sort", i === sorted ? (down ? "descending" : "ascending") : "none");
    });
  }

  table.querySelectorAll("th button").forEach(function (button, i) {
    button.addEventListener("click", function () {
      down = i === sorted ? !down : true;
      sorted = i;
      show();
    });
  });
  search.addEventListener("input", show);
  show();
})();
