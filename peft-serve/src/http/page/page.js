// Asks several models the same and shows their answers as they come. Text from the server is never read as HTML.
const at = (id) => document.getElementById(id);
const SHOWN = 200;
const chosen = new Set();
let models = [];
let running = null;

const headers = () => (at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {});

const message = async (response) => {
    const text = await response.text();
    try {
        return JSON.parse(text).error.message;
    } catch {
        return `${response.status} ${text.slice(0, 200)}`;
    }
};

const loadModels = async () => {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
        models = [];
        listModels();
        at("more").textContent = await message(response);
        return;
    }
    models = (await response.json()).data.map((model) => model.id);
    for (const name of chosen) if (!models.includes(name)) chosen.delete(name);
    if (!chosen.size && models.length) chosen.add(models[0]);
    listModels();
};

const listModels = () => {
    const wanted = at("filter").value.toLowerCase();
    const found = models.filter((name) => name.toLowerCase().includes(wanted));
    at("names").replaceChildren(...found.slice(0, SHOWN).map((name) => {
        const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: chosen.has(name) });
        box.onchange = () => (box.checked ? chosen.add(name) : chosen.delete(name));
        const label = document.createElement("label");
        label.append(box, ` ${name}`);
        const item = document.createElement("li");
        item.append(label);
        return item;
    }));
    at("more").textContent = found.length > SHOWN ? `and ${found.length - SHOWN} more: filter them` : "";
};

// The events of a stream, as their data.
const events = async function* (body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let kept = "";
    for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        const parts = (kept + value).split("\n\n");
        kept = parts.pop();
        for (const part of parts) {
            const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
            if (data.length) yield data.join("\n");
        }
    }
};

const card = (name) => {
    const [article, title, text, foot] = ["article", "h2", "pre", "footer"].map((tag) => document.createElement(tag));
    article.dataset.model = name;
    title.textContent = name;
    foot.textContent = "waiting";
    article.append(title, text, foot);
    return { article, text, foot };
};

const ask = async (name, { article, text, foot }, signal) => {
    const chat = at("kind").value === "chat";
    const prompt = at("prompt").value;
    const body = {
        model: name,
        ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
        max_tokens: at("tokens").valueAsNumber,
        temperature: at("temperature").valueAsNumber,
        stream: true,
        stream_options: { include_usage: true },
    };
    const began = performance.now();
    let [first, reason, tokens] = [null, null, null];
    const failed = (why) => {
        article.classList.add("failed");
        foot.textContent = why;
    };
    try {
        const path = chat ? "v1/chat/completions" : "v1/completions";
        const init = { method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
        const response = await fetch(path, init);
        if (!response.ok) return failed(await message(response));
        for await (const data of events(response.body)) {
            if (data === "[DONE]") break;
            const piece = JSON.parse(data);
            if (piece.error) return failed(piece.error.message);
            tokens = piece.usage?.completion_tokens ?? tokens;
            const choice = piece.choices?.[0];
            const more = (chat ? choice?.delta?.content : choice?.text) ?? "";
            if (more) {
                first ??= performance.now();
                text.append(more);
                foot.textContent = "writing";
            }
            reason = choice?.finish_reason ?? reason;
        }
        const seconds = (performance.now() - (first ?? began)) / 1000;
        const speed = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
        const wait = first === null ? "" : `, first after ${Math.round(first - began)} ms`;
        foot.textContent = `${tokens ?? "?"} tokens${speed}${wait}; ${reason === "length" ? "cut at the limit" : reason ?? "cut off"}`;
    } catch (error) {
        if (signal.aborted) foot.textContent = "stopped";
        else failed(`the connection broke: ${error.message}`);
    }
};

const send = async () => {
    running?.abort();
    const mine = (running = new AbortController());
    const names = models.filter((name) => chosen.has(name));
    const cards = names.map(card);
    at("answers").replaceChildren(...cards.map(({ article }) => article));
    if (!names.length) at("answers").textContent = "Choose a model.";
    at("stop").disabled = false;
    await Promise.all(names.map((name, i) => ask(name, cards[i], mine.signal)));
    if (running === mine) at("stop").disabled = true;
};

const watch = async () => {
    try {
        const response = await fetch("metrics");
        if (!response.ok) throw new Error(await message(response));
        const text = await response.text();
        const number = (name) => Number(text.match(new RegExp(`^\\w*${name} (\\S+)$`, "m"))?.[1] ?? NaN);
        const share = (100 * number("cache_used_tokens")) / number("cache_tokens");
        at("load").textContent =
            `${number("running_sequences")} running, ${number("waiting_requests")} waiting; cache ${share.toFixed(0)} %; ` +
            `${number("adapters_resident")} of ${number("adapters_registered")} adapters in memory, ` +
            `${(number("adapters_resident_bytes") / 1e6).toFixed(1)} MB`;
    } catch (error) {
        at("load").textContent = `no connection: ${error.message}`;
    }
    setTimeout(watch, 1000);
};

at("filter").oninput = listModels;
at("key").onchange = loadModels;
at("stop").onclick = () => running?.abort();
at("ask").onsubmit = (event) => {
    event.preventDefault();
    send();
};
at("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
};
loadModels();
watch();
