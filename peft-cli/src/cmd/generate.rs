//! `peft-cli generate`: text from a model, streamed.

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use peft_core::AdapterSet;
use peft_models::AnyModel;
use peft_models::generate::{GenerateOptions, Request};
use peft_models::tokenizer::Tokenizer;
use peft_train::data::ChatTemplate;
use peft_train::methods;
use serde_json::{Value, json};

use crate::args::GenerateArgs;
use crate::open;

struct Session<'a> {
    model: &'a AnyModel,
    tokenizer: &'a Tokenizer,
    adapters: AdapterSet,
    options: GenerateOptions,
    stream: bool,
}

struct Answer {
    text: String,
    tokens: usize,
    prompt_tokens: usize,
    seconds: f64,
}

pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let files = open::model(&args.model.model)?;
    let tokenizer = files.tokenizer()?;
    let model = files.load(&open::placement(&args.model.device, &args.model.dtype)?, 0)?;
    model.check_writes()?;
    if args.adapter.is_empty() && args.task_id.is_some() {
        bail!("--task-id goes with --adapter");
    }
    if args.adapter.len() > 1 && args.chat {
        bail!("--chat goes with one --adapter");
    }
    let mut adapters = AdapterSet::empty();
    for spec in &args.adapter {
        let adapter = methods::open(&open::adapter(spec)?, &model)?.adapter;
        let adapter = open::for_task(adapter, args.task_id)?.settled().context("--task-id")?;
        adapters = adapters.with(spec, Arc::new(adapter));
    }
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        stop: tokenizer.eos_token_ids().to_vec(),
    };
    peft_alloc::keep_pages();
    let session = Session { model: &model, tokenizer: &tokenizer, adapters, options, stream: !args.json };
    if !args.chat {
        let prompt = args.prompt.as_deref().context("--prompt is missing")?;
        if args.adapter.len() > 1 {
            return session.each(args, &tokenizer.encode(prompt, true)?);
        }
        let answer = session.answer(tokenizer.encode(prompt, true)?)?;
        return finish(args, &answer);
    }
    let template = chat_template(&tokenizer)?;
    let mut messages: Vec<Value> = Vec::new();
    if let Some(prompt) = &args.prompt {
        messages.push(json!({"role": "user", "content": prompt}));
        let answer = session.turn(&template, &messages)?;
        return finish(args, &answer);
    }
    if args.json {
        bail!("--json needs --prompt");
    }
    converse(&session, &template, &mut messages)
}

fn chat_template(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let source = tokenizer.chat_template().context(
        "the tokenizer has no chat template; use --prompt without --chat, or a model made for conversations",
    )?;
    let (bos, eos) = (tokenizer.bos_token(), tokenizer.eos_token());
    Ok(ChatTemplate::new(source, bos.as_deref(), eos.as_deref())?)
}

fn converse(session: &Session<'_>, template: &ChatTemplate, messages: &mut Vec<Value>) -> Result<()> {
    eprintln!("Type a message and press Enter; an empty line ends the conversation.");
    let mut lines = std::io::stdin().lock().lines();
    loop {
        eprint!("> ");
        std::io::stderr().flush()?;
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        if line.trim().is_empty() {
            return Ok(());
        }
        messages.push(json!({"role": "user", "content": line}));
        let answer = session.turn(template, messages)?;
        out!("");
        messages.push(json!({"role": "assistant", "content": answer.text}));
    }
}

impl Session<'_> {
    fn turn(&self, template: &ChatTemplate, messages: &[Value]) -> Result<Answer> {
        let text = template.render(messages, &serde_json::Map::new(), true)?;
        self.answer(self.tokenizer.encode(&text, false)?)
    }

    /// What every adapter writes, in one batch.
    fn each(&self, args: &GenerateArgs, prompt: &[u32]) -> Result<()> {
        refuse_empty(prompt)?;
        let slots = 0..self.adapters.names().count();
        let requests: Vec<Request> = slots.map(|slot| Request { prompt: prompt.to_vec(), slot: Some(slot) }).collect();
        let written = self.model.generate(&self.adapters, &requests, &self.options, |_, _| true)?;
        let mut answers = Vec::new();
        for (name, ids) in self.adapters.names().zip(written) {
            let text = self.tokenizer.decode(&ids, true)?;
            if !args.json {
                out!("{name}:\n{text}\n");
            }
            answers.push(json!({"adapter": name, "text": text, "tokens": ids.len()}));
        }
        if args.json {
            out!("{}", json!({"answers": answers, "prompt_tokens": prompt.len()}));
        }
        Ok(())
    }

    fn answer(&self, prompt: Vec<u32>) -> Result<Answer> {
        refuse_empty(&prompt)?;
        let prompt_tokens = prompt.len();
        let slot = self.adapters.adapter(0).map(|_| 0);
        let started = Instant::now();
        let (mut ids, mut shown) = (Vec::new(), 0);
        let mut failed = None;
        self.model.generate(&self.adapters, &[Request { prompt, slot }], &self.options, |_, token| {
            ids.push(token);
            if self.stream
                && let Err(e) = self.show(&ids, &mut shown)
            {
                failed = Some(e);
            }
            failed.is_none()
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        let text = self.tokenizer.decode(&ids, true)?;
        if self.stream {
            out_part!("{}", text.get(shown..).unwrap_or_default());
        }
        Ok(Answer { text, tokens: ids.len(), prompt_tokens, seconds: started.elapsed().as_secs_f64() })
    }

    /// Prints what is new and whole: a character may take several tokens.
    fn show(&self, ids: &[u32], shown: &mut usize) -> Result<()> {
        let text = self.tokenizer.decode(ids, true)?;
        if !text.ends_with('\u{FFFD}')
            && let Some(new) = text.get(*shown..)
        {
            out_part!("{new}");
            *shown = text.len();
        }
        Ok(())
    }
}

fn refuse_empty(prompt: &[u32]) -> Result<()> {
    if prompt.is_empty() {
        bail!("the prompt is empty: there is nothing to continue");
    }
    Ok(())
}

fn finish(args: &GenerateArgs, answer: &Answer) -> Result<()> {
    let rate = answer.tokens as f64 / answer.seconds.max(1e-9);
    if args.json {
        let result = json!({
            "text": answer.text, "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens, "tokens_per_second": rate
        });
        out!("{result}");
    } else {
        out!("");
        eprintln!("{} tokens after {} of prompt, {rate:.1} tokens/s", answer.tokens, answer.prompt_tokens);
    }
    Ok(())
}
