"""Training wordings of tasks that write, compute, report or are answered directly.

Paper: none (wording of the training tasks).
"""

from __future__ import annotations

RULES = {
    "pls": "||||please |could you |can you |would you |kindly |I need you to |I want you to |"
    "I'd like you to |now |",
    "make": "<pls>[create|make|write|add|set up|start|produce|generate|save|prepare]",
    "newfile": "[a file|a new file|the file|a text file|a file here]",
    "named": "[|named |called |with the name ]",
    "holding": "[that contains|with|containing|with the text|with the content|with the line|"
    "that says|which contains|holding|that holds|with the words|whose content is|with this text|"
    "that has|and put in it|and write in it|consisting of]",
    "thefile": "[the file |the file |||||||file |||our file |the document |the text file |the log |"
    "the list |the table |the notes |that file ]",
    "f": "<thefile>{file}",
    "change": "<pls>[change|set|update|switch|modify|turn|adjust|alter|put]",
    "replace": "<pls>[replace|change|swap|substitute|exchange]",
    "compute": "<pls>[compute|calculate|work out|evaluate|find|tell me|figure out|give me|solve]",
    "what": "[what is|what's|what is the result of|how much is|what do you get for|whats|"
    "what is the value of|what does this give:|what comes out of]",
    "say": "<pls>[say|repeat|echo|write|answer with|reply with|respond with|send back|type|print]",
    "item": "[item|element|entry|word|one|thing|name]",
    "has": "[there are|we have|{person} has|a shop has|the store holds|{person} fills|{person} "
    "buys|a truck carries|they own|the market sells]",
    "gets": "[gets|buys|finds|receives|orders|collects|makes|wins|takes in|is given|borrows]",
    "loses": "[gives away|loses|sells|eats|uses|breaks|throws away|drops|returns|sends away|"
    "gives a friend|gave away|lost|sold|used]",
    "gone": "[sold|broken|gone|lost|taken|used|removed|eaten|given away|sent away|thrown away|"
    "stolen]",
    "howmany": "how many",
    "weekday": "[monday|tuesday|wednesday|thursday|friday|saturday|sunday]",
    "intotal": "[are there|are there in total|are there altogether|is that|does that make|is that "
    "in total|are that together|are there in all|altogether|in total]",
    "left": "[are left|remain|are still there|are left now|does that leave|stay|are there still]",
    "oflist": "[of|in|from] [this list|the list|these|the following|the following list|"
    "these items|the list below|this]",
}

# Words that must stay the same throughout one problem; `box` also gives the slot `boxes`.
WORLD: dict[str, tuple[str, ...]] = {
    "box": tuple(
        "box bag crate basket pack carton sack jar tray drawer case tin stack pile bin cart rack "
        "row group bundle".split()
    ),
    "people": tuple(
        "people children friends students workers players guests families girls boys "
        "neighbors visitors teams schools women men".split()
    ),
    "money": tuple("dollars euros coins cents pounds".split()),
    "period": tuple("day week month hour year minute night shift".split()),
    "place": tuple(
        "box room shop store farm garden market cellar garage kitchen "
        "office barn school zoo warehouse museum hotel".split()
    ),
}

ACT: dict[str, tuple[str, ...]] = {
    "create": (
        "<make> <newfile> <named>{file} <holding> {q}.",
        "<make> <newfile> <named>{file} <holding> {q}",
        "<make> <newfile> <named>{file} <holding>: {text}",
        "<make> {file} <holding> {q}",
        "<make> {file} <holding>: {text}",
        "<pls>[write|put|save|store] {q} [to|into|in] [a file named |a file called |a new file |"
        "the file |the new file |]{file}.",
        "<pls>[write|put|save|store] [the text|the line|the words|this line|the sentence] {q} "
        "[to|into|in] [a file named |a file called |a new file |the file |]{file}",
        "<pls>[write|put|save|store] [this|the following|the following text|this text|this line] "
        "[to|into|in] [a file named |a new file |the file |]{file}: {text}",
        "<newfile> {file} [should be created|should exist|is needed] <holding> {q}",
        "I need <newfile> <named>{file} <holding> {q}.",
        "I [want|need] {file} to [contain|say|hold|read] {q}",
        "new file {file}: {text}",
        "in a new file {file}, write {q}",
        "{file} [should|must|is to] [have|hold] [this|one|the following] line: {text}",
        "[fill|start] [a file|a new file|the file] {file} with {q}",
        "[a file|a text file] {file} with [the line|the text|the words] {q}[, please|]",
        "<pls>[store|note|put down] in {file} [this|the following|this line|this text]: {text}",
    ),
    "create_block": (
        "<make> <newfile> <named>{file} <holding> [these lines|the following lines|this|"
        "the following|these contents|exactly these lines|the following text]:{gap}{text}",
        "<make> <newfile> <named>{file} with [this content|the following content|the content below|"
        "the lines below|exactly this content]:{gap}{text}",
        "<pls>[write|put|save|store] [this|the following|these lines|the following lines|the lines "
        "below] [to|into|in] [a file named |a new file |the file |]{file}:{gap}{text}",
        "<make> {file}:{gap}{text}",
        "<make> {file} with [these lines|the following lines|this text]:{gap}{text}",
        "I need <newfile> <named>{file} with [these lines|this content|this text]:{gap}{text}",
        "new file {file}:{gap}{text}",
        "{file} [should|must|is to] [have|hold|contain] [these lines|this text|the following "
        "lines]:{gap}{text}",
        "<pls>[store|put down|keep] [this|this text|what follows] [in|as|under the name] "
        "{file}:{gap}{text}",
    ),
    "create_list": (
        "<make> <newfile> <named>{file} with [these|the following] [items|words|entries|lines], "
        "one [per line|a line|on each line]: {items}",
        "<pls>[write|put|save|store] [these|the following] [items|words|entries] [to|into|in] "
        "<thefile>{file}, one [per line|a line|on each line]: {items}",
        "<make> <newfile> <named>{file} that lists {items}, [one per line|one a line|each on its "
        "own line|each in a line of its own]",
        "<pls>[write|put|save] {items} [to|into] <thefile>{file}, [one per line|one a line|each on "
        "its own line|each in a line of its own]",
        "<make> a list in {file}, one item [per|a] line: {items}",
        "one [per|on each] line, [write|put|save] {items} [to|into] <thefile>{file}",
        "list {items} in <newfile> <named>{file}, [one per line|each on its own line]",
        "{file} [should|must|is to] [have|hold|list] [these|the following] [words|items|"
        "entries], [one a line|each in its own line]: {items}",
        "<pls>[store|keep|note] {items} in {file}[, one a line|, each in its own line|, every "
        "item in a new line]",
        "<make> <newfile> <named>{file} out of {items}, [one a line|one per line]",
    ),
    "change_setting": (
        "<change> [|the ]{key} [in|of|inside] <f> to {new}",
        "<change> the value of {key} [in|of|inside] <f> to {new}",
        "in <f>, <change> [|the ]{key} to {new}",
        "in <f>, <change> the value of {key} to {new}",
        "<change> {key} to {new} in <f>",
        "<change> [|the ]{key} from {value} to {new} in <f>",
        "<replace> the value of {key} in <f> [by|with] {new}",
        "make {key} in <f> {new}",
        "[make|give] {key} the value {new} in <f>",
        "edit <f> so that {key} is {new}",
        "edit <f>[:| and] set {key} to {new}",
        "update <f>: {key} [should be|must be|is now|becomes] {new}",
        "{key} in <f> [should be|must be|has to be|needs to be] {new}[|. please change it|"
        ". change it|. please fix that]",
        "I [want|need] {key} to be {new} in <f>",
        "<f> has a wrong {key}; [it should be|set it to|change it to|the right value is] {new}",
        "the [new|right|correct] value of {key} in <f> is {new}[|. please update it|; update it]",
        "since today {key} is {new}[, so|;|, please] [update|adjust|edit|change] <f>",
        "[correct|fix|adjust|repair] {key} in <f>[: it is {new}|; it is {new}|. it should be "
        "{new}|, the value is {new}]",
        "from now {key} [must be|has to be|is] {new}. [change|update|edit|adjust] <f>[| for that]",
        "<pls>[enter|write|put] {new} [for|as] {key} in <f>",
        "let {key} be {new} in <f>",
    ),
    "rename_setting": (
        "<pls>rename [the setting |the key |the option |]{key} [in|of|inside] <f> to {new}",
        "<pls>rename [the setting |the key |]{key} to {new} in <f>",
        "in <f>, <pls>rename [the setting |the key |the option |]{key} to {new}",
        "[the setting|the key|the option] {key} in <f> [should be|must be|is to be] "
        "[called|named|renamed to] {new}, keep [its|the] value",
        "<change> the name of [the setting |the key |]{key} in <f> to {new}",
        "<pls>give [the setting|the key] {key} in <f> the [new |]name {new}",
        "in <f>, [the setting|the key|the option] {key} should [now |]be called {new}",
        "<f> [calls|names] a setting {key}; [it should be|make it|call it|its name should be] "
        "{new}",
        "[use|write] the name {new} [instead of|in place of] {key} for the [setting|key|option] "
        "in <f>",
    ),
    "replace_word": (
        "<replace> [the word |every |each |all |]{old} [by|with|for] {new} [in|everywhere in|"
        "throughout] <f>",
        "<replace> [every|each|all occurrences of|any|every occurrence of] {old} in <f> [by|with] "
        "{new}",
        "in <f>, <replace> [the word |every |each |all |]{old} [by|with] {new}",
        "<change> [every|each|the word|all] {old} [to|into] {new} [in|everywhere in|"
        "throughout] <f>",
        "<pls>write {new} instead of {old} in <f>",
        "<pls>use {new} instead of {old} [everywhere |]in <f>",
        "wherever <f> says {old}, [write|put|make it] {new}",
        "{old} should be {new} everywhere in <f>",
        "find {old} in <f> and replace it [by|with] {new}",
        "<pls>turn [each|every|all] {old} in <f> into {new}",
        "<pls>edit <f>[:| and] {old} becomes {new}[| everywhere]",
        "<f> should [say|have] {new} [in place of|where it says|instead of] {old}",
        "every {old} in <f> [is to become|should become|must become|should be] {new}",
    ),
    "append": (
        "<pls>[append|add|attach] [the line |the text |this line: |]{q} [to|at the end of|"
        "to the end of|at the bottom of|as the last line of] <f>",
        "<pls>[append|add] [this line|this|the following line|a line|one line] [to|at the end of|"
        "to the end of|at the bottom of] <f>: {text}",
        "<pls>[append|add] [to|at the end of] <f>[:| this:| the line:| the following line:] {text}",
        "<pls>write {q} at the end of <f>",
        "<pls>put {q} [at the end|at the bottom|after the last line] of <f>",
        "<pls>extend <f> [by|with] [the line |]{q}",
        "<f> needs [another|one more] line at the end: {text}",
        "at the end of <f>, [add|append|write] {q}",
        "one more line for <f>: {text}",
        "<f> [should|must|is to] [end with|get] [a new line|a last line|this line too|a further "
        "line]: {text}",
        "[a new|a further|a last|an extra] line [for|in|goes to the end of] <f>: {text}",
        "let <f> end with the line {q}",
    ),
    "replace_line": (
        "<replace> the line {q} in <f> [by|with] {nq}",
        "in <f>, <replace> the line {q} [by|with] {nq}",
        "<change> the line {q} [in|of] <f> [to|into] {nq}",
        "in <f>, the line {q} [should be|must be|should read|should say|must become] {nq}",
        "[the line|one line] in <f> [says|reads|is] {q}[. change it to|; it should be|"
        ". replace it by|; make it|. it should say] {nq}",
        "<f> has the line {q}[. replace it with|. change it to|; it should be] {nq}",
        "edit <f>: instead of {q} [it should say|write|put] {nq}",
        "edit <f> so that {q} becomes {nq}",
        "[where|in the place where] <f> says {q}[, it should say|, write|, put] {nq}",
        "<pls>[correct|fix] the line {q} in <f>[: it is|; it should be|, make it] {nq}",
    ),
    "delete_line": (
        "<pls>[delete|remove|drop|take out|erase] [the|all|every] [lines|line] [with|containing|"
        "that contain|that mention|mentioning|that have] {q} [from|in] <f>",
        "<pls>[delete|remove|drop|erase] [every|each|any] line [with|containing|that contains|"
        "that mentions|mentioning] {q} [from|in|of] <f>",
        "in <f>, <pls>[delete|remove|drop] [all|the|every] [lines|line] [with|containing] {q}",
        "lines [with|containing|that mention] {q} should [be removed from|be deleted from|"
        "go from] <f>",
        "clean <f>: remove [the|all|every] [lines|line] with {q}",
        "[no line|not one line] of <f> should [have|contain|mention] {q}[| any more]",
        "<pls>[take|cut] the lines [with|about] {q} [out of|from] <f>",
        "<f> should lose [its|all|the] lines with {q}",
    ),
    "rename_file": (
        "<pls>rename <f> to {target}",
        "<pls>rename <f> as {target}",
        "<pls>move <f> to {target}",
        "<pls>change the name of <f> to {target}",
        "<pls>give <f> the [new |]name {target}",
        "<f> [should be|must be|is to be] [called|named|renamed to] {target}",
        "the file {file} [should|must] [have|get] the name {target}",
        "the new name of <f> [is|should be] {target}[|, please rename it]",
        "<f> gets the [new |]name {target}",
        "from now on <f> [is called|has the name] {target}[. rename it|; rename it|]",
        "<pls>let <f> be [called|named] {target}",
    ),
    "copy_file": (
        "<pls>copy <f> to {target}",
        "<pls>make a copy of <f> [named|called|as|under the name|in] {target}",
        "<pls>duplicate <f> [as|to|under the name] {target}",
        "I need a copy of <f> [named|called|as|in] {target}",
        "<pls>save a copy of <f> [as|to|in|under the name] {target}",
        "<pls>copy the [contents|content] of <f> [to|into] [a new file |]{target}",
        "{target} [should be|is to be|must be] a copy of <f>",
        "<pls>keep a [second|spare|backup] copy of <f> [as|in|under] {target}",
    ),
    "delete_file": (
        "<pls>[delete|remove|erase|get rid of|throw away] <f>",
        "<pls>[delete|remove|erase] the file {file}[| from this folder| from here]",
        "<f> [is not needed any more|is no longer needed|should go|can go|must go|is old]"
        "[, delete it|; remove it|. please delete it|. remove it]",
        "I [do not|don't] need <f> [any more|any longer][, delete it|; remove it|. delete it]",
        "[make|let] <f> [go away|disappear|vanish]",
        "<f> [should|must] be [gone|deleted|removed|erased][| now| at once]",
        "see to it that <f> is [gone|removed|not there any more]",
        "[clear away|drop|wipe|trash] <f>",
        "[nobody|no one] needs <f>[. delete it|. remove it|; get rid of it]",
    ),
    "save_value": (
        "<pls>[read|find|take|get|look up] [|the value of |the ]{key} [in|from] <f> and [write|"
        "save|store|put] it [to|into|in] [the file |a new file |a file named |]{target}",
        "<pls>[write|save|store|put|copy] the value of {key} from <f> [to|into|in] [the file |"
        "a new file |a file named |]{target}",
        "<pls>make a file {target} with the value of {key} from <f>",
        "[what is the value of|look up] {key} in <f>[? write it to|? save it in| and save it in] "
        "{target}",
        "<pls>[save|store|write] [to|into|in] {target} the value [of {key} in|that {key} has in] "
        "<f>",
        "<pls>put only the value of {key} from <f> in {target}",
        "{target} should [hold|contain|have] the value [of {key} in|that {key} has in] <f>",
        "<f> has {key}[. put its value into|; write its value to|. save its value as] {target}",
        "[I need|I want] the value of {key} from <f> in [a file |]{target}",
    ),
    "sort_file": (
        "<pls>sort <f> [alphabetically |]and [save|write|store|put] the [result|sorted lines|"
        "output] [to|in|into|as] {target}",
        "<pls>sort [the lines of |]<f> [alphabetically |]into {target}",
        "<pls>[save|write|store|put] the sorted lines of <f> [to|in|into] {target}",
        "<pls>make {target} with the lines of <f> [sorted|in alphabetical order|in sorted order]",
        "<pls>make a sorted copy of <f> [named|called|in|as] {target}",
        "{target} should [hold|have|contain] the lines of <f> [in order|sorted|in alphabetical "
        "order]",
        "<pls>put <f> in alphabetical order[| and write that] into {target}",
    ),
    "save_count": (
        "<pls>[write|save|store|put] the [number of lines|line count] of <f> [to|in|into] {target}",
        "<pls>count the lines [of|in] <f> and [write|save|store|put] the [number|result|count] "
        "[to|in|into] {target}",
        "<pls>make a file {target} with the [number of lines|line count] of <f>",
        "how many lines does <f> have? [write|save|put] the [number|answer] [to|in|into] {target}",
        "{target} should [hold|have|contain] the number of lines [in|of] <f>",
        "<pls>note in {target} how many lines <f> has",
    ),
    "upper_file": (
        "<pls>[write|save|store|put] <f> in [capital letters|capitals|upper case] [to|in|into] "
        "{target}",
        "<pls>[convert|change|turn] <f> to [capital letters|capitals|upper case] and [write|save|"
        "store] [it|the result] [to|in|as] {target}",
        "<pls>make a copy of <f> in [capital letters|capitals|upper case] [named|called|as] "
        "{target}",
        "<pls>make {target} with the text of <f> in [capital letters|capitals|upper case]",
        "{target} should [hold|have|contain] the text of <f> in [capitals|capital letters|upper "
        "case]",
        "<pls>make all letters of <f> [capital|big] and [store|save|write] [that|it] [in|to|as] "
        "{target}",
    ),
    "save_result": (
        "<pls>[compute|calculate|work out|evaluate] {expression} and [write|save|store|put] the "
        "[result|value|answer|number] [to|in|into] {target}",
        "<pls>[write|save|store|put] the [result|value] of {expression} [to|in|into] {target}",
        "<pls>make a file {target} with the [result|value] of {expression}",
        "what is {expression}? [write|save|put] [it|the result|the answer] [to|in|into] {target}",
        "{target} should [hold|have|contain] the [result|value] of {expression}",
        "[I want|I need] the [result|value] of {expression} in [a file |the file |]{target}",
        "<pls>put what {expression} [gives|makes|is] into {target}",
        "<pls>[store|note|keep] [the result of |]{expression} in {target}, only the number",
    ),
    "list": (
        "<pls>[list|show|show me|name|tell me|give me] [the|all|all the] files[| here| in this "
        "folder| in the folder| of this folder| in the current directory]",
        "[what|which] files [are here|are in this folder|are there|do we have|do you see|can you "
        "see|are in the current directory]",
        "what is in [this|the] folder",
        "<pls>list [this|the] [folder|directory]",
        "<pls>[list|tell me|give me] the names of [the|all] files[| here| in this folder]",
        "what are the names of the files[| here| in this folder]",
    ),
    "expression": (
        "<what> {expression}",
        "<compute> {expression}",
        "<compute> the [value|result] of {expression}",
        "<compute>: {expression}",
        "{expression}",
        "{expression} = ?",
        "{expression} =",
        "how much [does {expression} make|is {expression}]",
        "what does {expression} [give|make|equal|come to|evaluate to]",
        "I need the [result|value] of {expression}",
        "<compute> this [sum|expression|calculation]: {expression}",
        "the result of {expression} is",
    ),
    "spoken_add": (
        "<what> {a} plus {b}",
        "<compute> {a} plus {b}",
        "<compute> the sum of {a} and {b}",
        "<pls>add {a} [and|to] {b}",
        "what is the sum of {a} and {b}",
        "what do {a} and {b} make [together|in total]",
        "if you add {b} to {a}, what do you get",
        "how much are {a} and {b} together",
        "{a} and {b} added together",
    ),
    "spoken_subtract": (
        "<what> {a} minus {b}",
        "<compute> {a} minus {b}",
        "<compute> {a} less {b}",
        "<pls>subtract {b} from {a}",
        "<pls>take {b} away from {a}",
        "what is {b} subtracted from {a}",
        "what is the difference between {a} and {b}",
        "what is left if you take {b} from {a}",
        "from {a} take {b}, what remains",
    ),
    "spoken_multiply": (
        "<what> {a} times {b}",
        "<compute> {a} times {b}",
        "<what> {a} multiplied by {b}",
        "<compute> {a} multiplied by {b}",
        "<pls>multiply {a} [by|with|and] {b}",
        "<compute> the product of {a} and {b}",
        "what is the product of {a} and {b}",
        "what do you get if you multiply {a} by {b}",
    ),
    "spoken_divide": (
        "<what> {a} divided by {b}[|, as an integer|, rounded down|, without the remainder]",
        "<compute> {a} divided by {b}[|, as a whole number|, rounded down]",
        "<pls>divide {a} by {b}[| and drop the remainder| and round down]",
        "how many times does {b} [fit|go] into {a}",
        "how often does {b} [fit|go] into {a}",
        "what is the [integer |whole |]quotient of {a} and {b}",
        "<compute> the [integer |whole |]quotient of {a} and {b}",
    ),
    "spoken_remainder": (
        "<what> {a} [modulo|mod] {b}",
        "<compute> {a} [modulo|mod] {b}",
        "what is the remainder of {a} divided by {b}",
        "what remains when {a} is divided by {b}",
        "<compute> the remainder of {a} divided by {b}",
        "<compute> the remainder when [you divide {a}|dividing {a}|{a} is divided] by {b}",
        "divide {a} by {b}[. what is the remainder|; what is the remainder|, what remains]",
    ),
    "problem_times": (
        "<has> {a} {boxes} [with|of|and each has|, each with] {b} {thing}[| each]. <howmany> "
        "{thing} <intotal>",
        "[each|every|one] {box} [holds|has|contains|can hold] {b} {thing}. <howmany> {thing} [are "
        "in|do you find in|fit in|are there in] {a} [of them|such {boxes}|of these|{boxes}]",
        "{person} [buys|orders|sells|wants|needs] {a} {thing} [at|for] {b} {money} each. [how much "
        "does {person} [pay|spend|need][| in total]|what is the total price|how much is that]",
        "[one|a|each|every] [ticket|book|lamp|chair|hat|pen|shirt|meal|room] costs {b} {money}. "
        "[what do|how much do] {a} of them cost",
        "{person} [packs|makes|sells|reads|counts|writes|bakes|paints|washes|repairs] {b} {thing} "
        "[a|every|per|each] {period}. <howmany> [is that |{thing} is that |]in {a} {period}s",
        "a [hall|room|train|stadium|theater|bus|cinema|plane] has {a} rows [of|with] {b} seats"
        "[| each]. how many seats [are there|does it have|is that]",
        "a [machine|factory|worker|baker|printer|robot] makes {b} {thing} [a|per|every|each] "
        "{period}. <howmany> does it make in {a} {period}s",
        "[in|on] {a} [houses|streets|floors|pages|tables|farms|gardens] there are {b} {thing} each."
        " <howmany> {thing} <intotal>",
        "{a} {people} [bring|have|carry|own|get|pay for] {b} {thing} each. <howmany> {thing} "
        "<intotal>",
    ),
    "problem_plus": (
        "{person} [has|had|owns|holds|keeps] {a} {thing} and <gets> {b} more[| {thing}]. <howmany> "
        "{thing} does {person} have [now|in total|then|altogether]",
        "there are {a} {thing} [in the first|in one|in a] {place} and {b} in [the other|the second|"
        "another][| one]. <howmany> {thing} <intotal>",
        "[a|the] {place} [has|had] {a} {thing} and <gets> [another {b}|{b} more|{b} new ones]. "
        "<howmany> <intotal>",
        "{person} [counts|sells|makes|finds|reads|eats|buys] {a} {thing} on <weekday> and {b} "
        "[more |]on <weekday>. <howmany> <intotal>",
        "{a} {thing} are [on the table|in the {place}] and {b} [more come|more arrive|are added|"
        "are put there too]. <howmany> are there [now|then]",
        "{person} has {a} {thing}[,| and] [a friend|a sister|a brother|another one] has {b}. "
        "<howmany> {thing} do they have [together|in total|altogether]",
    ),
    "problem_minus": (
        "{person} [has|had|owns|owned|made] {a} {thing} and <loses> {b}[| of them]. <howmany> "
        "<left>",
        "there [are|were] {a} {thing} [in the {place}|in stock|on the table]. {b} [of them |][are|"
        "were] <gone>. <howmany> <left>",
        "of {a} {thing}, {b} are <gone>. <howmany> <left>",
        "[a|the] {place} had {a} {thing} and <loses> {b}. <howmany> <left>",
        "{person} needs {a} {thing} [and|but] [already has|has] {b}. <howmany> [are missing|more "
        "are needed|more does {person} need]",
        "{person} <loses> {b} of {a} {thing}. <howmany> <left>",
    ),
    "problem_share": (
        "{a} {thing} are [shared|split|divided|given out] [equally|evenly|fairly] [among|between] "
        "{b} {people}. <howmany> does each [one |of them |]get",
        "{person} [puts|packs|places|sorts] {a} {thing} [equally |evenly |]into {b} {boxes}. "
        "<howmany> [are in|go into] each [one|{box}|of them]",
        "{b} {people} [share|split|divide] {a} {thing} [equally|evenly]. <howmany> does each [one |"
        "][get|receive|have]",
        "we have {a} {thing} for {b} {people}, [the same number for each|all get the same]. "
        "<howmany> [for each|does each one get]",
        "{person} [gives|hands out] {a} {thing} to {b} {people}, the same number to each. <howmany>"
        " does [each|every one] [get|receive]",
    ),
    "problem_left_over": (
        "{a} {thing} are [packed|put|sorted] into {boxes} of {b}. <howmany> are left over",
        "{person} [puts|packs|sorts] {a} {thing} into {boxes} [of|with] {b} each. <howmany> [are "
        "left over|remain over|do not fit in a full one]",
        "{a} {thing} are [shared|divided|split] [equally |evenly |]among {b} {people}. <howmany> "
        "are left over",
        "with {b} {thing} in each {box}, how many of {a} {thing} are left over",
        "{b} {people} [share|split|divide] {a} {thing} [equally|evenly]. how many are left over",
    ),
    "problem_times_plus": (
        "<has> {a} {boxes} [with|of] {b} {thing} each and {c} [more|extra|loose ones|single ones]. "
        "<howmany> {thing} <intotal>",
        "{person} buys {a} {thing} [at|for] {b} {money} each and [pays|adds] {c} {money} for "
        "[delivery|a bag|a card|a box]. how much is that [in total|altogether]",
        "each of {a} {boxes} holds {b} {thing}, and {c} more [lie|are] [beside them|on the floor|"
        "on the table|outside]. <howmany> {thing} <intotal>",
        "{a} {people} [bring|have|carry] {b} {thing} each, and {person} [brings|has] {c} more. "
        "<howmany> {thing} <intotal>",
    ),
    "problem_times_minus": (
        "<has> {a} {boxes} [with|of] {b} {thing} each. {c} [of them |]are <gone>. <howmany> <left>",
        "each of {a} {boxes} holds {b} {thing}. {c} of them are [<gone>|bad|old]. <howmany> "
        "[<left>|are still good]",
        "{person} has {a} {boxes} [with|of] {b} {thing} each and <loses> {c}[| {thing}| of them]. "
        "<howmany> <left>",
    ),
    "problem_plus_minus": (
        "{person} [has|had] {a} {thing}, <gets> {b} more and [then |]<loses> {c}. <howmany> [<left>"
        "|does {person} have now|does {person} have then]",
        "there [are|were] {a} {thing} [in the {place}|in stock]. {b} [arrive|come in|are added|more"
        " come] and {c} are <gone>. <howmany> [are there now|<left>]",
        "a [bus|train|ship|plane|tram] has {a} [people|passengers]. {b} get on and {c} get off. how"
        " many are on it [now|then]",
        "[a|the] {place} had {a} {thing}, <gets> {b} more and <loses> {c}. <howmany> <left>",
    ),
    "problem_plus_plus": (
        "{person} [counts|sells|makes|finds|reads] {a} {thing} on <weekday>, {b} on <weekday> and "
        "{c} on <weekday>. <howmany> <intotal>",
        "three {boxes} [hold|have|contain] {a}, {b} and {c} {thing}. <howmany> {thing} <intotal>",
        "three {people} have {a}, {b} and {c} {thing}. <howmany> {thing} <intotal>",
        "{person} has {a} {thing}, [another has|a friend has] {b} and a third [one |]has {c}. how "
        "many do they have [together|in total|altogether]",
        "{person} has {a} {thing}, <gets> {b} more and [then |]another {c}. <howmany> <intotal>",
    ),
    "repeat": (
        "<say> {q}",
        "<say> [the words|the phrase|exactly|the text|just] {q}",
        "<say> [this|the following|exactly this|this phrase]: {phrase}",
        "repeat after me: {phrase}",
        "echo: {phrase}",
        "your [answer|reply] should be {q}",
        "I want [to hear|to see|you to say] {q}",
        "[just|only|simply] [say|write|answer|repeat] {q}",
        "<say> {q}[, no more|, that is all|, only that|]",
        "[let|make] your [answer|reply] be {q}",
    ),
    "pick": (
        "what is the {nth} <item> <oflist>: {items}",
        "<pls>[tell me|give me|name|say|find|pick|choose] the {nth} <item> <oflist>: {items}",
        "which <item> [is|comes|stands] {nth} [in|of] [this list|the list|the following|these]: "
        "{items}",
        "[here is a list|this is a list|a list|the list is]: {items}. [what is the {nth} <item>|"
        "which <item> is {nth}|tell me the {nth} <item>|give me the {nth} <item>]",
        "{items}: [which is the {nth} <item>|what is the {nth} <item>|give me the {nth}]",
        "[given|from|of] {items}, [what is the {nth} <item>|name the {nth} <item>|which <item> is "
        "{nth}]",
        "{nth} <item> of {items}",
        "[look at|take|consider] [this list|the list|these]: {items}. [which is|what is|say|"
        "name] the {nth}[| one]",
        "{items}. [which one comes|what comes|which is] {nth}",
    ),
    "member": (
        "is {word} [in|part of|on|contained in] [this list|the list|the following list|the list "
        "below]: {items}",
        "is {word} [among|one of] [these|the following|these items|these words]: {items}",
        "does [this list|the list|the following list] [contain|include|have] {word}: {items}",
        "[here is a list|this is a list|a list|the list is]: {items}. [is {word} in it|does it "
        "contain {word}|is {word} part of it|does it include {word}]",
        "{items}: [is {word} there|is {word} in this list|does the list contain {word}]",
        "[given|in] the list {items}, [is {word} there|is {word} included|do you see {word}]",
        "<pls>[tell me|say|check] whether {word} is [in|among|one of]: {items}",
        "[look at|take|consider] [this list|the list|these]: {items}. [can you find {word} there|"
        "do you see {word}|is there {word}]",
        "{items}. [does {word} appear|do you find {word}][| there| in it]",
    ),
    "statement": (
        "{statement} [what is|what's] the {attribute} [of|for] {subject}",
        "{statement} [which|what] {attribute} does {subject} have",
        "{statement} <pls>[tell me|say|give me|repeat] the {attribute} [of|for] {subject}",
        "[note|know|listen|you should know|read this|keep in mind|here are some facts]: "
        "{statement} [what is|tell me] the {attribute} [of|for] {subject}",
        "what is the {attribute} of {subject}? {statement}",
        "[if|suppose|given] [this is true|that]: {statement} what is the {attribute} of {subject}",
        "[remember|consider|take note|here is some information|these are facts|for your "
        "information|we know this|this is known][:|.] {statement} [what is|give me|tell me|and "
        "what is|what, then, is] the {attribute} [of|for] {subject}",
        "{statement} [according to this|from that|judging by this|so|now], what is the "
        "{attribute} [of|for] {subject}",
        "{statement} {subject}: which {attribute}",
        "{statement} [and|so|now] the {attribute} of {subject} is",
    ),
    "which": (
        "{statement} [which one is|what is|which is|which thing is] {property}",
        "{statement} <pls>[tell me|say|name] [which one is {property}|what is {property}|the "
        "{property} one|the one that is {property}]",
        "[note|know|listen|suppose|look]: {statement} [which one is|what is|which is] {property}",
        "which one is {property}? {statement}",
        "[what is|which is] the {property} one? {statement}",
        "[remember|consider|take note|here is some information|these are facts|we know this][:|"
        ".] {statement} [which of them is|which thing is|what is|name what is|so what is] "
        "{property}",
        "{statement} [which of them|which thing|what] is {property}",
        "{statement} [I ask|a question|now]: [which one|what] is {property}",
        "{statement} [give me|find|pick] [the one that is {property}|what is {property}|the "
        "{property} one]",
    ),
    "greeting": (
        "[hello|hi|hey|good morning|good evening|good day|hi there|greetings|hello there], [I am|"
        "I'm|my name is|this is|it's|here is] {person}",
        "[hello|hi|hey|good morning|good evening|good day|greetings]! [I am|I'm|my name is|this is|"
        "they call me|you can call me] {person}",
        "my name is {person}[, hello|, hi|. hello|, nice to meet you|. nice to meet you|. how are "
        "you|, and who are you]",
        "I am {person}[, hello|, nice to meet you|. say hello to me|. please greet me]",
        "[greet|say hello to|say hi to|welcome] {person}",
    ),
    "largest": (
        "<pls>[tell me|find|name|report|show me|say] the [largest|biggest] file[| here| in this "
        "folder| in the folder| in the current directory]",
        "which file is [the largest|the biggest|largest|biggest][| here| in this folder]",
        "what is the [largest|biggest] file[| here| in this folder| in the folder]",
        "which of the files is the [largest|biggest]",
        "<pls>[tell me|find|say] which file [is the largest|is the biggest|takes the most space|"
        "has the most bytes]",
        "[biggest|largest] file[| here| in this folder]",
    ),
    "smallest": (
        "<pls>[tell me|find|name|report|show me|say] the smallest file[| here| in this folder| in "
        "the folder| in the current directory]",
        "which file is [the smallest|smallest][| here| in this folder]",
        "what is the smallest file[| here| in this folder| in the folder]",
        "which of the files is the smallest",
        "<pls>[tell me|find|say] which file [is the smallest|takes the least space|has the fewest "
        "bytes]",
        "smallest file[| here| in this folder]",
    ),
    "alphabet_first": (
        "which line of <f> [is|comes] first [in alphabetical order|alphabetically|in the alphabet]",
        "<pls>sort <f> [alphabetically |]and [tell me|give me|report|show] the first line",
        "<pls>sort the lines of <f>[. which one is first|. what is the first one|; which is first]",
        "what is the first [line|entry|word] of <f> [after sorting|when sorted|in alphabetical "
        "order|alphabetically]",
        "if you sort <f>, [which line is|what is|what comes] first",
        "alphabetically first [line|entry|word] of <f>",
    ),
    "alphabet_last": (
        "which line of <f> [is|comes] last [in alphabetical order|alphabetically|in the alphabet]",
        "<pls>sort <f> [alphabetically |]and [tell me|give me|report|show] the last line",
        "<pls>sort the lines of <f>[. which one is last|. what is the last one|; which is last]",
        "what is the last [line|entry|word] of <f> [after sorting|when sorted|in alphabetical "
        "order|alphabetically]",
        "if you sort <f>, [which line is|what is|what comes] last",
        "alphabetically last [line|entry|word] of <f>",
    ),
    "newest": (
        "what is the [newest|latest|most recent|last] entry [in|of] [the log |]{file}",
        "<pls>[tell me|show me|give me|report|print] the [newest|latest|most recent|last] [entry|"
        "log line|message] [in|of|from] [the log |]{file}",
        "what [was logged last|did the log say last|is the last message] in {file}",
        "[newest|latest|last|most recent] [entry|log line|message] of {file}",
        "what happened last according to [the log |]{file}",
    ),
    "row_max": (
        "which {first} has the [highest|largest|biggest|most|greatest|maximum|top] {column} in <f>",
        "<pls>[tell me|find|name|say] the {first} with the [highest|largest|biggest|most|greatest|"
        "maximum] {column} in <f>",
        "in <f>, which {first} has the [highest|largest|biggest|most|greatest] {column}",
        "which row of <f> has the [highest|largest|biggest|greatest] {column}",
        "who or what has the [highest|largest|most] {column} in <f>",
        "{first} with the [highest|largest|most] {column} in <f>",
    ),
    "row_min": (
        "which {first} has the [lowest|smallest|least|fewest|minimum] {column} in <f>",
        "<pls>[tell me|find|name|say] the {first} with the [lowest|smallest|least|fewest|minimum] "
        "{column} in <f>",
        "in <f>, which {first} has the [lowest|smallest|least|fewest] {column}",
        "which row of <f> has the [lowest|smallest|least] {column}",
        "who or what has the [lowest|smallest|least] {column} in <f>",
        "{first} with the [lowest|smallest|least] {column} in <f>",
    ),
    "run": (
        "<pls>[run|execute|start|try|do] {q} and [tell me|report|show me|give me|say] [what it "
        "prints|the output|the result|what comes out|its output]",
        "<pls>[run|execute|try] [the command |this command: |this: |]{q}",
        "what [does {q} print|is the output of {q}|does the command {q} give|do you get from {q}]",
        "what happens if you run {q}",
        "[output|result] of {q}",
        "<pls>[show me|tell me|give me] the [output|result] of [the command |]{q}",
    ),
    "exists": (
        "is there a file [named |called |]{file}[| here| in this folder]",
        "does <f> exist[| here| in this folder]",
        "<pls>[check|tell me|find out|say] [whether|if] [<f> exists|there is a file {file}|<f> is "
        "there|<f> is here]",
        "do we have a file [named |called |]{file}",
        "can you [see|find] a file [named |called |]{file}[| here]",
        "<f>: [does it exist|is it there|is it here]",
    ),
}
