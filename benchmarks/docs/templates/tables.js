// Sorting and filtering of tables. Without it they stand as they are.
const key = cell => { const k = cell.dataset.key; return k === undefined ? cell.textContent.trim().toLowerCase() : Number(k); };
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => { const x = key(a.cells[column]), y = key(b.cells[column]);
        return typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1; };
      [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)).forEach(row => body.append(row));
    };
  });
  if (body.rows.length < 8) continue;
  const filter = document.createElement("input");
  filter.className = "filter"; filter.type = "search"; filter.placeholder = "filter rows"; filter.ariaLabel = "filter rows";
  filter.oninput = () => { const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word)); };
  table.closest(".scroll").before(filter);
}
