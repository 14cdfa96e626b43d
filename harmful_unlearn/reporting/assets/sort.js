// A click on a column's head sorts its table: up, down, then back to the order of the methods. Numbers are compared by
// their value, without the interval; what was not measured stays last.
const key = (row, place) => {
  const text = row.cells[place].textContent.trim().replace(/^−/, "-");
  const number = text.match(/^[+-]?\d[\d.]*(e[+-]?\d+)?/i);
  return text === "–" || text === "" ? [2, ""] : number ? [0, Number(number[0])] : [1, text];
};
const compare = ([a, x], [b, y]) => a - b || (a ? x.localeCompare(y, "en", { numeric: true }) : x - y);
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (rows.length < 2) continue;
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const next = { ascending: "descending", descending: "" }[head.ariaSort] ?? "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.ariaSort = next;
      const sign = { ascending: 1, descending: -1 }[next] ?? 0;
      const order = (a, b) => ((a[0] === 2 || b[0] === 2) ? a[0] - b[0] : sign * compare(a, b));
      body.append(...(sign ? [...rows].sort((a, b) => order(key(a, place), key(b, place))) : rows));
    };
  });
}
