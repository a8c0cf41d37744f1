//! The modules of a crate, and what each uses of the others. Tests are left out.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use proc_macro2::{TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::Visit;
use syn::{Attribute, Item, ItemMod, UseTree, Visibility};

/// A module's path from the crate's root, which is the empty path.
pub type ModulePath = Vec<String>;

/// One module.
pub struct Module {
    /// Where it is.
    pub file: PathBuf,
    /// It and all modules that it is in are public.
    pub is_public: bool,
    /// Absolute paths (without `crate`) that it mentions, with their lines.
    pub uses: Vec<(ModulePath, usize)>,
    /// Names that it makes available from elsewhere, with the paths that they stand for, and whether
    /// publicly. A glob has the name `*`.
    pub reexports: Vec<(String, ModulePath, bool)>,
    /// Public types that it defines, with their lines.
    pub types: Vec<(String, usize)>,
}

/// A crate's modules by their paths.
pub type Modules = BTreeMap<ModulePath, Module>;

/// Reads the crate whose root module is this file.
pub fn read(root: &Path) -> anyhow::Result<Modules> {
    let mut modules = Modules::new();
    read_file(root, &mut Vec::new(), true, &mut modules)?;
    resolve_reexports(&mut modules);
    Ok(modules)
}

/// The module that a path leads into: its longest prefix that is one.
pub fn module_of<'a>(modules: &Modules, path: &'a [String]) -> &'a [String] {
    let mut len = path.len();
    while !modules.contains_key(&path[..len]) {
        len -= 1;
    }
    &path[..len]
}

fn read_file(
    file: &Path,
    path: &mut ModulePath,
    is_public: bool,
    modules: &mut Modules,
) -> anyhow::Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("Cannot read {}", file.display()))?;
    let source = syn::parse_file(&text).with_context(|| format!("Cannot parse {}", file.display()))?;
    read_items(&source.items, file, path, is_public, modules)
}

fn read_items(
    items: &[Item],
    file: &Path,
    path: &mut ModulePath,
    is_public: bool,
    modules: &mut Modules,
) -> anyhow::Result<()> {
    let mut visitor = Visitor { path: path.clone(), uses: Vec::new(), reexports: Vec::new() };
    let mut types = Vec::new();
    for item in items.iter().filter(|item| !is_test(attributes(item))) {
        if let Item::Mod(module) = item {
            path.push(module.ident.to_string());
            let is_public = is_public && is_pub(&module.vis);
            match &module.content {
                Some((_, items)) => read_items(items, file, path, is_public, modules)?,
                None => read_file(&file_of(file, module, path), path, is_public, modules)?,
            }
            path.pop();
            continue;
        }
        types.extend(public_type(item));
        visitor.visit_item(item);
    }
    let Visitor { uses, reexports, .. } = visitor;
    modules.insert(path.clone(), Module { file: file.to_owned(), is_public, uses, reexports, types });
    Ok(())
}

/// Names that stand for something elsewhere are followed to where it is.
fn resolve_reexports(modules: &mut Modules) {
    let targets: HashMap<ModulePath, ModulePath> = modules
        .iter()
        .flat_map(|(path, module)| {
            let named = module.reexports.iter().filter(|(name, ..)| name != "*");
            named.map(|(name, target, _)| ([&path[..], std::slice::from_ref(name)].concat(), target.clone()))
        })
        .collect();
    let follow = |path: &ModulePath| {
        let mut path = path.clone();
        // A chain of re-exports is short; one that goes in circles does not compile.
        for _ in 0..8 {
            let prefix = (1..=path.len()).find(|&len| targets.contains_key(&path[..len]));
            let Some(len) = prefix else { break };
            path = [&targets[&path[..len]][..], &path[len..]].concat();
        }
        path
    };
    let resolved: Vec<_> = modules
        .values()
        .map(|module| module.uses.iter().map(|(path, line)| (follow(path), *line)).collect::<Vec<_>>())
        .collect();
    for (module, uses) in modules.values_mut().zip(resolved) {
        module.uses = uses;
    }
}

/// The file of `mod name;` in `file`.
fn file_of(file: &Path, module: &ItemMod, path: &ModulePath) -> PathBuf {
    let directory = file.parent().expect("a file is in a directory");
    for attribute in &module.attrs {
        if attribute.path().is_ident("path")
            && let syn::Meta::NameValue(syn::MetaNameValue { value: syn::Expr::Lit(literal), .. }) =
                &attribute.meta
            && let syn::Lit::Str(name) = &literal.lit
        {
            return directory.join(name.value());
        }
    }
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let own_directory =
        if path.len() == 1 || stem == "mod" { directory.to_owned() } else { directory.join(stem) };
    let name = module.ident.to_string();
    let flat = own_directory.join(format!("{name}.rs"));
    if flat.exists() { flat } else { own_directory.join(name).join("mod.rs") }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether it is compiled for tests only.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || (attribute.path().is_ident("cfg")
                && attribute
                    .meta
                    .require_list()
                    .is_ok_and(|list| list.tokens.to_string().split_whitespace().next() == Some("test")))
    })
}

fn is_pub(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn public_type(item: &Item) -> Option<(String, usize)> {
    let (visibility, name) = match item {
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Enum(item) => (&item.vis, &item.ident),
        Item::Trait(item) => (&item.vis, &item.ident),
        Item::Type(item) => (&item.vis, &item.ident),
        Item::Union(item) => (&item.vis, &item.ident),
        _ => return None,
    };
    is_pub(visibility).then(|| (name.to_string(), name.span().start().line))
}

/// Collects the paths that begin with `crate`, `self` or `super`.
struct Visitor {
    path: ModulePath,
    uses: Vec<(ModulePath, usize)>,
    reexports: Vec<(String, ModulePath, bool)>,
}

impl Visitor {
    /// Without `crate`, `self` and `super`; None for a path of another kind.
    fn absolute(&self, segments: &[String]) -> Option<ModulePath> {
        let supers = segments.iter().take_while(|&segment| segment == "super").count();
        match segments.first()?.as_str() {
            "crate" => Some(segments[1..].to_vec()),
            "self" => Some([&self.path[..], &segments[1..]].concat()),
            "super" if supers <= self.path.len() => {
                Some([&self.path[..self.path.len() - supers], &segments[supers..]].concat())
            }
            _ => None,
        }
    }

    fn note(&mut self, segments: &[String], line: usize) {
        self.uses.extend(self.absolute(segments).map(|path| (path, line)));
    }

    fn use_tree(&mut self, tree: &UseTree, prefix: &mut ModulePath, is_public: bool) {
        let (name, last) = match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.use_tree(&path.tree, prefix, is_public);
                prefix.pop();
                return;
            }
            UseTree::Group(group) => {
                return group.items.iter().for_each(|tree| self.use_tree(tree, prefix, is_public));
            }
            UseTree::Name(name) => (name.ident.to_string(), name.ident.to_string()),
            UseTree::Rename(rename) => (rename.rename.to_string(), rename.ident.to_string()),
            UseTree::Glob(_) => ("*".to_owned(), String::new()),
        };
        let mut path = prefix.clone();
        if last == "self" || last.is_empty() {
            // `use a::{self}` and `use a::*` name `a`.
        } else {
            path.push(last);
        }
        let name = if name == "self" { prefix.last().cloned().unwrap_or_default() } else { name };
        self.note(&path, tree.span().start().line);
        // A path without `crate` may begin with a child of this module.
        let target = self.absolute(&path).unwrap_or_else(|| [&self.path[..], &path[..]].concat());
        self.reexports.push((name, target, is_public));
    }

    fn tokens(&mut self, tokens: TokenStream) {
        let mut segments: ModulePath = Vec::new();
        let mut line = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    line = ident.span().start().line;
                    segments.push(ident.to_string());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {}
                other => {
                    self.note(&std::mem::take(&mut segments), line);
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.note(&segments, line);
    }
}

impl<'ast> Visit<'ast> for Visitor {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.use_tree(&item.tree, &mut Vec::new(), is_pub(&item.vis));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: ModulePath = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.note(&segments, path.span().start().line);
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        self.visit_path(&item.path);
        self.tokens(item.tokens.clone());
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            syn::visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_test(&item.attrs) {
            syn::visit::visit_impl_item_fn(self, item);
        }
    }
}
