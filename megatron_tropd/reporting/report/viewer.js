// The viewer of sampled rollouts: one token at a time, by mouse, by keyboard or by a link such as
// #step=8&sample=1&token=5.  Texts of models reach the page as textContent only.
(function () {
  "use strict";
  const steps = JSON.parse(document.getElementById("rollout-data").textContent).steps;
  const at = (id) => document.getElementById(id);
  const view = at("response"), panel = at("panel"), pickStep = at("pick-step"), pickSample = at("pick-sample");
  const REGIONS = {
    guidance: "guidance by the teacher",
    guidance_copy: "guidance, repeated in this sample: in no loss",
    on_policy: "written by the student",
  };
  const state = { step: 0, sample: 0, token: null };

  function element(tag, text, className) {
    const made = document.createElement(tag);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  const sample = () => steps[state.step].samples[state.sample];
  const percent = (share) => (100 * share).toPrecision(3) + "%";

  // JSON has no infinity: it is "inf" or "-inf" there, the logarithm of 0.
  const asNumber = (value) => (typeof value === "number" ? value : value === "-inf" ? -Infinity : Infinity);
  const nats = (value) => (typeof value === "number" ? value.toFixed(4) : value);
  const logprob = (value) => nats(value) + " (" + percent(Math.exp(asNumber(value))) + ")";

  // How the gate decided on the sample, in words; "" for a method without a gate.
  function gateOf(tokens) {
    const known = tokens.trust.filter((weight) => weight !== null);
    if (!known.length) return "";
    if (tokens.coin.some((coin) => coin !== null)) return "coin";
    return known.some((weight) => weight > 0 && weight < 1) ? "weight" : "rule";
  }

  const REJECTED = {
    coin: "rejected by the gate's coin",
    weight: "accepted with less than 50%",
    rule: "rejected by the gate",
  };
  const TRUSTED = { coin: "accepted by the gate's coin", weight: "accepted with 50% or more", rule: "accepted by the gate" };

  function lookOf(tokens, index) {
    if (tokens.region[index] === "guidance") return "guidance";
    if (tokens.region[index] === "guidance_copy") return "guidance copy";
    if (tokens.trust[index] === null) return "written";
    return tokens.trust[index] < 0.5 ? "rejected" : "trusted";
  }

  // A token without a text of its own shows its name; a line break can be seen and pointed at.
  function textOf(tokens, index) {
    const text = tokens.texts[index];
    return text === "" ? tokens.names[tokens.ids[index]] || "\u00b7" : text.replace(/\n/g, "\u21b5\n");
  }

  function drawLegend(tokens) {
    const words = {
      guidance: REGIONS.guidance,
      "guidance copy": REGIONS.guidance_copy,
      written: REGIONS.on_policy,
      trusted: TRUSTED[gateOf(tokens)],
      rejected: REJECTED[gateOf(tokens)],
    };
    const looks = tokens.ids.map((_, index) => lookOf(tokens, index));
    const parts = [element("span", "prompt", "soft")];
    for (const look of Object.keys(words)) if (looks.includes(look)) parts.push(element("span", words[look], "token " + look));
    at("legend").replaceChildren(...parts.flatMap((part, index) => (index ? [" ", part] : [part])));
  }

  function drawSummary(shown) {
    const facts = ["prompt " + shown.uid + (shown.name ? " (" + shown.name + ")" : ""), "sample " + shown.sample_index];
    facts.push(shown.num_tokens + " tokens", "finish: " + shown.finish);
    if (shown.correct !== null) facts.push(shown.correct ? "right" : "wrong");
    if (shown.trusted_share !== null) facts.push("trusted: " + percent(shown.trusted_share));
    if (shown.tokens && shown.tokens.ids.length < shown.num_tokens)
      facts.push("numbers of the first " + shown.tokens.ids.length + " tokens only");
    at("summary").textContent = facts.join(" / ");
  }

  function drawSample() {
    const shown = sample(), tokens = shown.tokens;
    drawSummary(shown);
    const parts = [element("span", shown.prompt, "soft")];
    if (tokens) {
      drawLegend(tokens);
      tokens.ids.forEach((_, index) => {
        const made = element("span", textOf(tokens, index), "token " + lookOf(tokens, index));
        if (tokens.texts[index] === "") made.classList.add("nameless");
        made.dataset.index = index;
        made.tabIndex = index === (state.token || 0) ? 0 : -1;
        parts.push(made);
      });
    } else at("legend").replaceChildren();
    parts.push(element("span", shown.rest));
    view.replaceChildren(...parts);
  }

  function row(name, value) {
    const made = document.createElement("tr");
    made.append(element("th", name), element("td", value));
    return made;
  }

  function gateRows(tokens, index) {
    const weight = tokens.trust[index], coin = tokens.coin[index], reward = tokens.reward[index];
    if (weight === null) return [];
    const verdict = weight < 0.5 ? "rejected" : "accepted";
    if (coin === null)
      return [gateOf(tokens) === "weight" ? row("acceptance probability", percent(weight)) : row("gate", verdict)];
    return [
      row("acceptance probability", percent(Math.min(1, Math.exp(asNumber(reward))))),
      row("coin", "u = " + coin + ", log u = " + Math.log(coin).toFixed(4) + ": " + verdict),
    ];
  }

  function topTable(tokens, index) {
    const table = element("table", "", "top");
    table.append(element("caption", "The teacher's most probable tokens"));
    for (const [id, value] of tokens.teacher_top[index]) {
      const made = document.createElement("tr");
      made.append(element("td", JSON.stringify(tokens.names[id])), element("td", "id " + id, "number"));
      made.append(element("td", percent(Math.exp(value)), "number"), element("td", value.toFixed(4), "number"));
      if (id === tokens.ids[index]) made.className = "chosen";
      table.append(made);
    }
    return table;
  }

  function drawPanel(index) {
    const tokens = sample().tokens;
    for (const old of view.querySelectorAll(".current")) old.classList.remove("current");
    if (!tokens || index === null) {
      panel.replaceChildren(element("p", "Point at a token, or move with the arrow keys.", "soft"));
      return;
    }
    view.querySelector('[data-index="' + index + '"]').classList.add("current");
    const table = element("table", "");
    const text = tokens.texts[index] || tokens.names[tokens.ids[index]];
    table.append(row("token", JSON.stringify(text) + ", id " + tokens.ids[index]));
    table.append(row("place", index + 1 + " of " + sample().num_tokens), row("region", REGIONS[tokens.region[index]]));
    const numbers = [
      ["student log p", tokens.student_logprob, logprob],
      ["teacher log q", tokens.teacher_logprob, logprob],
      ["R = log q - log p", tokens.reward, nats],
    ];
    for (const [name, column, shown] of numbers)
      if (column[index] !== null) table.append(row(name, shown(column[index])));
    table.append(...gateRows(tokens, index));
    if (tokens.teacher_entropy[index] !== null)
      table.append(row("teacher's entropy", nats(tokens.teacher_entropy[index]) + " nats"));
    panel.replaceChildren(table);
    if (tokens.teacher_top[index].length) panel.append(topTable(tokens, index));
  }

  // The link to what is shown; a page that may not change its address works without.
  function writeLink() {
    const token = state.token === null ? "" : "&token=" + state.token;
    const link = "#step=" + steps[state.step].step + "&sample=" + state.sample + token;
    try {
      history.replaceState(null, "", link);
    } catch (error) {
      if (error.name !== "SecurityError") throw error;
    }
  }

  function fillSamples() {
    const names = steps[state.step].samples.map((one, index) => {
      const option = element("option", index + ": prompt " + (one.name || one.uid) + ", sample " + one.sample_index);
      option.value = index;
      return option;
    });
    pickSample.replaceChildren(...names);
  }

  function show(step, index, token) {
    state.step = Math.max(steps.findIndex((one) => one.step === step), 0);
    state.sample = steps[state.step].samples[index] ? index : 0;
    const tokens = sample().tokens;
    state.token = tokens && token >= 0 && token < tokens.ids.length ? token : null;
    pickStep.value = state.step;
    fillSamples();
    pickSample.value = state.sample;
    drawSample();
    drawPanel(state.token);
  }

  function select(index) {
    const tokens = sample().tokens;
    if (!tokens || !tokens.ids.length) return;
    state.token = Math.min(Math.max(index, 0), tokens.ids.length - 1);
    for (const old of view.querySelectorAll('[tabindex="0"]')) old.tabIndex = -1;
    const chosen = view.querySelector('[data-index="' + state.token + '"]');
    chosen.tabIndex = 0;
    chosen.focus();
    drawPanel(state.token);
    writeLink();
  }

  function fromLink() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const whole = (name) => (/^\d+$/.test(asked.get(name) || "") ? Number(asked.get(name)) : -1);
    show(asked.has("step") ? whole("step") : steps[steps.length - 1].step, whole("sample"), whole("token"));
    if (!asked.has("step")) return;
    at("viewer").scrollIntoView();
    const current = view.querySelector(".current");
    if (current) current.scrollIntoView({ block: "nearest" });
  }

  const indexOf = (event) => {
    const found = event.target.closest("[data-index]");
    return found ? Number(found.dataset.index) : null;
  };
  view.addEventListener("mouseover", (event) => indexOf(event) !== null && drawPanel(indexOf(event)));
  view.addEventListener("mouseleave", () => drawPanel(state.token));
  view.addEventListener("click", (event) => indexOf(event) !== null && select(indexOf(event)));
  view.addEventListener("focusin", (event) => indexOf(event) !== null && drawPanel(indexOf(event)));
  view.addEventListener("keydown", (event) => {
    const index = indexOf(event);
    const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: Infinity, Enter: index }[event.key];
    if (index === null || target === undefined) return;
    event.preventDefault();
    select(target);
  });
  pickStep.addEventListener("change", () => (show(steps[pickStep.value].step, 0, -1), writeLink()));
  pickSample.addEventListener("change", () => {
    show(steps[state.step].step, Number(pickSample.value), -1);
    writeLink();
  });
  window.addEventListener("hashchange", fromLink);

  pickStep.replaceChildren(
    ...steps.map((one, index) => {
      const option = element("option", one.step);
      option.value = index;
      return option;
    }),
  );
  at("viewer").hidden = false;
  fromLink();
})();
