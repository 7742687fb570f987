"use strict";
(() => {
  const list = document.getElementById("sample-rows");
  if (!list) return;
  const field = (id) => document.getElementById(id);
  const tools = field("sample-tools");
  const systems = JSON.parse(list.dataset.systems);
  const PAGE = 50;
  const LONGEST = 1e6;

  // Prompt, answers and replies; a long text stands in two parts.
  const textIn = (node) => [...node.querySelectorAll(".text, .id")]
    .map((part) => (part.parentElement.matches("details.clip") ? "" : "\n") + part.textContent).join("");
  const rows = [...list.children].map((node) => ({
    node,
    text: textIn(node).toLowerCase(),
    margins: JSON.parse(node.dataset.margins),
    contradictions: JSON.parse(node.dataset.contradictions),
    same: JSON.parse(node.dataset.same),
    words: JSON.parse(node.dataset.words),
  }));

  // Which two systems, by which judge. Won, lost and margins are those of the second.
  let chosen = { first: Math.max(0, systems.length - 2), second: systems.length - 1 };
  if (field("first")) chosen = { first: Number(field("first").value), second: Number(field("second").value) };
  const pair = () => {
    const [low, high] = [Math.min(chosen.first, chosen.second), Math.max(chosen.first, chosen.second)];
    return low * systems.length - (low * (low + 1)) / 2 + high - low - 1;
  };
  const judge = () => (field("judge") ? Number(field("judge").value) : 0);
  const margin = (row) => {
    const found = row.margins[judge()]?.[pair()] ?? null;
    return found === null || chosen.first < chosen.second ? found : -found;
  };

  const shown = {
    won: (row) => margin(row) > 0,
    lost: (row) => margin(row) !== null && margin(row) < 0,
    tied: (row) => margin(row) === 0,
    same: (row) => row.same[pair()] === 1,
    contradicts: (row) => row.contradictions[judge()]?.[pair()] === 1,
    open: (row) => margin(row) === null,
  };
  const minus = (value) => (value === null ? null : -value);
  const longer = ({ words }) => {
    const [a, b] = [words[chosen.first], words[chosen.second]];
    return a === null || b === null ? null : b - a;
  };
  const places = {
    gain: (row) => minus(margin(row)),
    loss: margin,
    long: (row) => minus(row.words[chosen.second]),
    short: (row) => row.words[chosen.second],
    longer: (row) => minus(longer(row)),
    shorter: longer,
  };

  // Words of two texts, and which of them are not in the longest common subsequence.
  const SPLIT = /^\s+|(?:[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|(?:(?![\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}])[\p{L}\p{M}\p{N}_])+|\S)\s*/gu;
  const split = (text) => (text.match(SPLIT) ?? []).map((part) => ({ part, word: part.trim(), changed: false }));
  // A space is marked only between two marked words.
  const pieces = (words) => words.flatMap(({ part, word, changed }, k) => [
    { part: word, changed },
    { part: part.slice(word.length), changed: changed && Boolean(words[k + 1]?.changed) },
  ]).filter((piece) => piece.part);
  const compare = (a, b) => {
    let start = 0;
    while (start < a.length && start < b.length && a[start].word === b[start].word) start++;
    let [endA, endB] = [a.length, b.length];
    while (endA > start && endB > start && a[endA - 1].word === b[endB - 1].word) { endA--; endB--; }
    for (let i = start; i < endA; i++) a[i].changed = true;
    for (let j = start; j < endB; j++) b[j].changed = true;
    const [n, m] = [endA - start, endB - start];
    if (n * m > LONGEST) return; // what lies between the equal ends counts as changed
    const best = new Uint16Array((n + 1) * (m + 1));
    const at = (i, j) => i * (m + 1) + j;
    for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) {
      best[at(i, j)] = a[start + i].word === b[start + j].word
        ? best[at(i + 1, j + 1)] + 1 : Math.max(best[at(i + 1, j)], best[at(i, j + 1)]);
    }
    for (let i = 0, j = 0; i < n && j < m;) {
      if (a[start + i].word === b[start + j].word) {
        a[start + i++].changed = b[start + j++].changed = false;
      } else if (best[at(i + 1, j)] >= best[at(i, j + 1)]) i++; else j++;
    }
  };
  const spans = (row, system) => [...row.node.querySelectorAll(`[data-system="${system}"] .text`)];
  const textOf = (found) => found.map((span) => span.textContent).join("");
  const paint = (found, words, tag) => {
    // An answer may be cut in two, its beginning and what unfolds: a word may be cut with it.
    const left = pieces(words);
    for (const span of found) {
      let room = span.textContent.length;
      const parts = document.createDocumentFragment();
      while (room > 0) {
        const [next] = left;
        const text = next.part.slice(0, room);
        room -= text.length;
        if (text.length < next.part.length) left[0] = { ...next, part: next.part.slice(text.length) };
        else left.shift();
        const same = parts.lastChild && (parts.lastChild.nodeType === Node.ELEMENT_NODE) === next.changed;
        if (same) parts.lastChild.textContent += text;
        else if (next.changed) parts.append(Object.assign(document.createElement(tag), { textContent: text }));
        else parts.append(text);
      }
      span.replaceChildren(parts);
    }
  };
  let painted = [];
  const plain = () => {
    for (const span of painted) span.textContent = span.textContent;
    painted = [];
  };
  const mark = (row) => {
    const [a, b] = [spans(row, chosen.first), spans(row, chosen.second)];
    if (!a.length || !b.length) return;
    const [wordsA, wordsB] = [split(textOf(a)), split(textOf(b))];
    compare(wordsA, wordsB);
    paint(a, wordsA, "del");
    paint(b, wordsB, "ins");
    painted.push(...a, ...b);
  };

  let page = 0;
  const update = () => {
    plain();
    const wanted = field("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const which = shown[field("which").value];
    const found = rows.filter((row) => (!which || which(row)) && wanted.every((word) => row.text.includes(word)));
    const place = places[field("order").value];
    if (place) {
      const values = new Map(found.map((row) => [row, place(row)]));
      found.sort((x, y) => {
        const [a, b] = [values.get(x), values.get(y)];
        return a === null || b === null ? (a === null) - (b === null) : a - b;
      });
    }
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.max(0, Math.min(page, pages - 1));
    const here = found.slice(page * PAGE, (page + 1) * PAGE);
    for (const row of rows) row.node.hidden = true;
    for (const row of here) row.node.hidden = false;
    list.prepend(...here.map((row) => row.node));
    const only = Boolean(field("only")?.checked);
    for (const row of here) {
      for (const node of row.node.querySelectorAll("[data-system]")) {
        const system = Number(node.dataset.system);
        node.hidden = only && system !== chosen.first && system !== chosen.second;
      }
      for (const node of row.node.querySelectorAll("[data-pair]")) {
        node.hidden = only && Number(node.dataset.pair) !== pair();
      }
      if (field("differences").checked) mark(row);
    }
    const range = pages > 1 ? `, ${page * PAGE + 1} to ${page * PAGE + here.length} of them below` : "";
    field("sample-count").textContent = `${found.length} of ${rows.length} prompts${range}`;
    field("sample-pages").hidden = pages < 2;
    field("earlier").disabled = page === 0;
    field("later").disabled = page === pages - 1;
  };
  const rename = () => {
    for (const option of tools.querySelectorAll("[data-words]")) {
      option.textContent = option.dataset.words.replace("{a}", () => systems[chosen.first]).replace("{b}", () => systems[chosen.second]);
    }
  };
  const choose = () => {
    if (!field("first")) return;
    const next = { first: Number(field("first").value), second: Number(field("second").value) };
    if (next.first === next.second) { // the other one takes the place that has become free
      if (next.first !== chosen.first) next.second = chosen.first; else next.first = chosen.second;
      field("first").value = next.first;
      field("second").value = next.second;
    }
    chosen = next;
    rename();
  };
  const again = () => { choose(); page = 0; update(); };
  const turn = (step) => {
    page += step;
    update();
    field("sample-found").focus();
    field("sample-found").scrollIntoView({ block: "start" });
  };
  tools.addEventListener("input", again);
  tools.addEventListener("reset", () => setTimeout(again));
  tools.addEventListener("submit", (event) => event.preventDefault());
  field("earlier").addEventListener("click", () => turn(-1));
  field("later").addEventListener("click", () => turn(1));
  tools.hidden = field("sample-found").hidden = false;
  update();
})();
